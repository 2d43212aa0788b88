import datetime
import email.utils
import functools

import httpx2
import openai
import pytest

from huatuo_jax.feedback.server_faults import fault_of, scrubbed

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
        (status_error(403), "stop", True),
        (status_error(404), "stop", True),
        (status_error(429), "ask again", True),
        (status_error(429, body={"code": "insufficient_quota"}), "stop", True),
        (status_error(400), "give up unless first", True),
        (status_error(422), "give up unless first", True),
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
