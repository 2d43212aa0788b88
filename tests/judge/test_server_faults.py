import datetime
import email.utils
import functools
import json

import httpx2
import openai
import pytest

from huatuo_jax.judge.completions import NoCompletion, read_completion, words_of
from huatuo_jax.judge.server import fault_of, scrubbed

KEY = "sk-0123456789abcdef"
REQUEST = httpx2.Request("POST", "http://host/v1/chat/completions")


def fault(error):
    return fault_of(error, key=KEY, model="m", where="the server", timeout_s=5.0)


def status_error(status, *, body=None, headers=None):
    response = httpx2.Response(status, headers=headers, request=REQUEST)
    return openai.APIStatusError("said", response=response, body=body)


def broken(cause):
    error = openai.APIConnectionError(request=REQUEST)
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "consequence", "unbilled"),
    [
        (status_error(401), "stop", True),
        (status_error(402), "stop", True),
        (status_error(403), "give up", True),
        (status_error(404), "stop unless answered", True),
        (status_error(429), "ask again", True),
        (status_error(429, body={"code": "insufficient_quota"}), "stop", True),
        (status_error(400), "give up", True),
        (status_error(413), "give up", True),
        (status_error(422), "give up", True),
        (status_error(400, body={"code": "context_length_exceeded"}), "give up", True),
        (status_error(400, body={"message": "maximum context length is 9"}), "give up", True),
        (status_error(400, body={"code": "content_filter"}), "give up", True),
        (status_error(408), "ask again", False),
        (status_error(500), "ask again", True),
        (status_error(503), "ask again", True),
        # The gateway does not know what the server behind it did.
        (status_error(502), "ask again", False),
        (status_error(504), "ask again", False),
        (TimeoutError(), "ask again", False),
        (openai.APITimeoutError(REQUEST), "ask again", False),
        (broken(httpx2.ReadError("cut")), "ask again", False),
        (broken(httpx2.RemoteProtocolError("cut")), "ask again", False),
        (broken(httpx2.ConnectError("refused")), "ask again", True),
        (ValueError("not JSON"), "ask again", False),
    ],
)
def test_each_failure_has_its_consequence_and_its_price(error, consequence, unbilled):
    found = fault(error)
    assert (found.consequence, found.unbilled) == (consequence, unbilled)


def test_an_error_behind_a_byte_order_mark_is_read():
    content = b"\xef\xbb\xbf" + json.dumps({"error": {"param": "temperature"}}).encode()
    response = httpx2.Response(400, content=content, request=REQUEST)
    error = openai.APIStatusError("said", response=response, body=content.decode())
    assert fault(error).consequence == "stop unless answered"


ANSWERED = {"choices": None, "usage": None}
# As servers write them; the status, the body, what to do.
SERVERS_WORDS = [
    # A question that cannot be judged.
    (400, {"code": "data_inspection_failed", "message": "Input data may contain"}, "give up"),
    (
        400,
        {"error": {"message": "Content Exists Risk", "code": "invalid_request_error"}},
        "give up",
    ),
    (400, {"error": {"code": 400, "type": "exceed_context_size_error", "n_ctx": 9}}, "give up"),
    (
        400,
        {"error": {"code": "1301", "message": "系统检测到输入或生成内容可能包含不安全内容"}},
        "give up",
    ),
    (
        400,
        {"error": {"type": "content_filter", "message": "it was considered high risk"}},
        "give up",
    ),
    (
        400,
        {"error": {"param": "prompt", "innererror": {"code": "ResponsibleAIPolicyViolation"}}},
        "give up",
    ),
    (400, {"message": "Range of input length should be [1, 30720]"}, "give up"),
    (400, {"message": "prompt is too long: 210000 tokens > 200000 maximum"}, "give up"),
    (
        400,
        {
            "message": "'max_tokens' or 'max_completion_tokens' is too large: 1024. This model's"
            " maximum context length is 2048 tokens and your request has 1500 input tokens"
        },
        "give up",
    ),
    (
        403,
        {
            "error": {
                "code": 403,
                "message": "x",
                "metadata": {"reasons": ["violence"], "flagged_input": "…"},
            }
        },
        "give up",
    ),
    (403, {"error": {"message": "Your input was flagged by moderation"}}, "give up"),
    (422, {"detail": "Input tokens exceed the limit of this model"}, "give up"),
    (500, {"error": "the request exceeds the available context size"}, "give up"),
    (200, {"base_resp": {"status_code": 1026, "status_msg": "input new_sensitive"}}, "give up"),
    # What every question would meet.
    (
        403,
        {"error": {"message": "You are not allowed to sample from this model"}},
        "give up unless all",
    ),
    (400, {"error": {"message": "Incorrect API key provided: xa***"}}, "stop"),
    (400, {"error": {"message": "API key not valid. Please pass a valid API key."}}, "stop"),
    (400, {"error": {"message": "Model Not Exist"}}, "stop"),
    (400, {"error": {"message": "some/thing is not a valid model ID"}}, "stop"),
    (
        404,
        {"error": {"message": "The model `m` does not exist", "code": "model_not_found"}},
        "stop",
    ),
    (400, {"error": {"message": "Your credit balance is too low to access the API"}}, "stop"),
    (402, {"error": {"message": "Insufficient Balance"}}, "stop"),
    (403, {"code": 30001, "message": "Sorry, your account balance is insufficient"}, "stop"),
    (403, {"error": {"code": "AccountOverdueError"}}, "stop"),
    (403, {"error": {"code": "AllocationQuota.FreeTierOnly"}}, "stop"),
    (403, {"error": {"code": "insufficient_user_quota", "message": "用户额度不足"}}, "stop"),
    (429, {"error": {"code": "1113", "message": "余额不足或无可用资源包,请充值。"}}, "stop"),
    (429, {"error": {"type": "exceeded_current_quota_error"}}, "stop"),
    (400, {"error": {"type": "budget_exceeded", "message": "Budget has been exceeded!"}}, "stop"),
    (200, {"base_resp": {"status_code": 1008, "status_msg": "insufficient balance"}}, "stop"),
    (200, {"error": {"code": 401, "message": "User not found."}}, "stop"),
    (
        400,
        {
            "message": "Unsupported parameter: 'max_tokens' is not supported with this model. Use"
            " 'max_completion_tokens' instead."
        },
        "stop unless answered",
    ),
    (
        400,
        {"error": {"param": "max_tokens", "message": "max_tokens is too large: 99999."}},
        "stop unless answered",
    ),
    (
        400,
        {"error": {"param": "temperature", "message": "Only 1 is taken"}},
        "stop unless answered",
    ),
    (
        400,
        {"error": {"message": "This response_format type is unavailable now"}},
        "stop unless answered",
    ),
    # What passes.
    (
        429,
        {"error": {"message": "You exceeded your current quota, please retry in 34 s"}},
        "ask again",
    ),
    (
        429,
        {"error": {"message": "Request too large for m on tokens per min: Limit 9"}},
        "ask again",
    ),
    (503, {"error": {"message": "The model is overloaded, input queue exceeded"}}, "ask again"),
    (403, {"error": {"message": "Rate limit exceeded"}}, "ask again"),
    (200, {"base_resp": {"status_code": 1002, "status_msg": "rate limit"}}, "ask again"),
    (200, {"error": {"message": "Provider returned error", "code": 502}}, "ask again"),
    # What nobody knows.
    (400, {"error": {"message": "Bad request"}}, "give up unless all"),
    (
        422,
        {"detail": [{"msg": "Field required", "input": "余额不足, content_filter"}]},
        "give up unless all",
    ),
]


@pytest.mark.parametrize(("status", "body", "consequence"), SERVERS_WORDS)
def test_the_words_of_real_servers_tell_a_question_from_all_questions(status, body, consequence):
    if status == 200:
        with pytest.raises(NoCompletion) as error:
            read_completion(json.dumps(body | ANSWERED).encode())
        found = fault(error.value)
        assert not found.unbilled  # It came with a 200.
    else:  # The client takes off the outer object.
        found = fault(status_error(status, body=body.get("error", body)))
    unless_all = consequence.endswith(" unless all")
    assert found.consequence == consequence.removesuffix(" unless all"), found
    assert (found.ends_after is not None) == unless_all
    said = words_of(body)
    assert said is None or said[:200] in found.message


def test_only_what_answered_or_broke_off_was_reached():
    reached = [fault(error).reached for error in (status_error(500), broken(httpx2.ReadError("")))]
    assert reached == [True, True]
    assert not fault(broken(httpx2.ConnectError("refused"))).reached


def headers_of(seconds):
    """Made when the test begins: the clock goes on while others run."""
    then = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)
    return {"Retry-After": email.utils.format_datetime(then, usegmt=True)}


@pytest.mark.parametrize(
    ("headers", "low", "high"),
    [
        ({"Retry-After": "7"}, 7, 7),
        ({"Retry-After": "0.5"}, 0.5, 0.5),
        ({"retry-after-ms": "250", "Retry-After": "1"}, 0.25, 0.25),
        (functools.partial(headers_of, 3000), 2000, 3000),
        (functools.partial(headers_of, -30), 0, 0),
        ({"Retry-After": "soon"}, 0, 0),
        ({"Retry-After": "nan"}, 0, 0),
        ({"Retry-After": "-3"}, 0, 0),
        ({"Retry-After": "1e400"}, 0, 0),
        ({"Retry-After": "1764341234"}, 0, 0),  # A time of day in seconds, not a time to wait.
        ({"Retry-After": "Thu, 01 Jan 1970 00:00:99999999999999999999 GMT"}, 0, 0),
        ({"Retry-After": "99999999999999999999999 Jan 2020 00:00:00"}, 0, 0),
        ({"Retry-After": "Mon, 99 Jan 2020 00:00:00 GMT"}, 0, 0),
        ({"Retry-After": "Fri, 31 Dec 9999 23:59:59 -2359"}, 0, 0),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 +99999999999999999999999"}, 0, 0),
        ({}, 0, 0),
    ],
)
def test_retry_after_is_read_as_seconds_or_as_a_date(headers, low, high):
    headers = headers() if callable(headers) else headers
    assert low <= fault(status_error(429, headers=headers)).wait_s <= high


@pytest.mark.parametrize(
    "body",
    [
        {"message": f"no key {KEY}"},
        {"error": {"message": f"bad {KEY} for you"}},
        {"error": f"bad {KEY}"},
        {"detail": f"bad {KEY}"},
        f"<html>{KEY}</html>",
        {"message": "Incorrect API key provided: sk-01234****cdef."},
    ],
)
@pytest.mark.parametrize("status", [400, 401, 404, 429, 500])
def test_no_message_holds_the_key_or_a_part_of_it(status, body):
    message = fault(status_error(status, body=body)).message
    assert KEY not in message and "sk-" not in message and "cdef" not in message
    assert f"HTTP {status}" in message and "\n" not in message


def test_a_word_instead_of_a_key_is_left_in_texts():
    assert scrubbed("none of these", "none") == "none of these"
    assert scrubbed("my-secret-key here", "my-secret-key") == "[key] here"
    assert scrubbed("您的密钥sk-01234****cdef无效", KEY) == "您的密钥[key]无效"
