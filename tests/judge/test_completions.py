"""Bodies of replies as real servers send them, and as no server should."""

import json

import pytest

from huatuo_jax.judge.completions import NoCompletion, read_completion
from huatuo_jax.judge.replies import Token
from huatuo_jax.judge.spending import Usage

WRONG = [None, 7, -1.5, True, "text", "", [], [None], [[]], {}, {"x": 1}, 10**30, float("nan")]


def body(*, message=None, choice=None, **changed):
    message = {"role": "assistant", "content": "好"} | (message or {})
    choice = {"index": 0, "message": message, "finish_reason": "stop"} | (choice or {})
    return {"choices": [choice], "usage": None} | changed


def read(row):
    return read_completion(json.dumps(row).encode())


def usage_of(**usage):
    return read(body(usage=usage)).usage


def test_a_plain_reply_is_read():
    found = read(body(usage={"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}))
    assert found == ("好", None, "stop", None, Usage(input_tokens=3, output_tokens=2))


@pytest.mark.parametrize(
    ("usage", "output"),
    [
        ({"prompt_tokens": 10, "completion_tokens": 5}, 5),
        ({"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}, 5),
        # Thoughts outside the completion, in the total or in the details alone.
        ({"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 1015}, 1005),
        (
            {
                "prompt_tokens": 10,
                "completion_tokens": 5,
                "total_tokens": 15,
                "completion_tokens_details": {"reasoning_tokens": 1000},
            },
            1005,
        ),
        # Thoughts that are a part of the completion are not counted twice.
        (
            {
                "prompt_tokens": 10,
                "completion_tokens": 50,
                "total_tokens": 60,
                "completion_tokens_details": {"reasoning_tokens": 40},
            },
            50,
        ),
        ({"prompt_tokens": 10, "completion_tokens": None, "total_tokens": 17}, 7),
        ({"prompt_tokens": 10.0, "completion_tokens": 5.0, "total_tokens": "many"}, 5),
        ({"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 3}, 5),
    ],
)
def test_output_is_all_that_was_made_thoughts_too(usage, output):
    assert usage_of(**usage) == Usage(input_tokens=10, output_tokens=output)


@pytest.mark.parametrize(
    "usage",
    [
        {},
        {"prompt_tokens": 10},
        {"completion_tokens": 5},
        {"prompt_tokens": -1, "completion_tokens": 5},
        {"prompt_tokens": True, "completion_tokens": 5},
        {"prompt_tokens": 10.5, "completion_tokens": 5},
        {"prompt_tokens": float("nan"), "completion_tokens": 5},
        {"prompt_tokens": float("inf"), "completion_tokens": 5},
        {"prompt_tokens": 10**400, "completion_tokens": 5},
        {"prompt_tokens": 10, "completion_tokens": 10**12},
        {"prompt_tokens": 3, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 4}},
    ],
)
def test_counts_that_cannot_be_are_none(usage):
    assert usage_of(**usage) is None


def test_any_type_at_any_place_is_read_as_absent_or_is_an_error_of_the_server():
    """Every field of a full body takes every wrong value; nothing but `NoCompletion` comes."""
    token = {"token": "好", "bytes": [229], "logprob": -0.1, "top_logprobs": []}
    full = body(
        message={"refusal": None},
        choice={"logprobs": {"content": [token | {"top_logprobs": [token]}]}},
        usage={
            "prompt_tokens": 1,
            "completion_tokens": 1,
            "total_tokens": 2,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0},
        },
        error=None,
        base_resp={"status_code": 0},
    )
    count = 0
    for path in list(paths(full)):
        for wrong in WRONG:
            row = json.loads(json.dumps(full))
            put(row, path, wrong)
            count += 1
            try:
                found = read(row)
            except NoCompletion:
                continue
            assert found.text is None or isinstance(found.text, str)
            assert found.usage is None or found.usage.output_tokens >= 0
    assert count > 300


def paths(value, before=()):
    yield before
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for name, inner in items:
        if isinstance(inner, dict | list):
            yield from paths(inner, (*before, name))
        else:
            yield (*before, name)


def put(row, path, value):
    if not path:
        row.clear()
        row["choices"] = value
        return
    for name in path[:-1]:
        row = row[name]
    row[path[-1]] = value


def test_text_in_parts_is_joined_without_the_thoughts():
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "嗯"}]}]
    parts += [{"type": "text", "text": "好"}, {"type": "text", "text": "的"}]
    assert read(body(message={"content": parts})).text == "好的"
    assert read(body(message={"content": parts[:1]})).text is None


def test_a_refusal_is_kept_in_the_models_words():
    found = read(body(message={"content": None, "refusal": "I can't help."}))
    assert (found.text, found.refusal) == (None, "I can't help.")


def test_tokens_have_their_bytes_and_the_log_probabilities_that_are_numbers():
    content = [
        {"token": "?", "bytes": [229, 165], "logprob": None, "top_logprobs": None},
        {"token": "1", "logprob": -0.5},
        {
            "token": "2",
            "bytes": "no list",
            "logprob": -1,
            "top_logprobs": [
                {"token": "1", "logprob": float("nan")},
                {"token": "3", "logprob": -9999.0},
                {"token": None, "logprob": -2.0},
                {"token": "4", "logprob": "-2"},
                None,
            ],
        },
    ]
    assert read(body(choice={"logprobs": {"content": content}})).tokens == (
        Token(b"\xe5\xa5", {}),
        Token(b"1", {b"1": -0.5}),
        Token(b"2", {b"2": -1.0, b"3": -9999.0}),
    )
    for wrong in (None, [], [{"logprob": -1.0}], [*content, None]):
        assert read(body(choice={"logprobs": {"content": wrong}})).tokens is None


@pytest.mark.parametrize(
    ("row", "body_of_error"),
    [
        ({"error": {"message": "no"}}, "all"),
        (body(error="no"), "all"),
        ({"object": "error", "message": "no", "code": 400}, "all"),
        ({"success": False, "code": 1, "choices": None}, "all"),
        ({"code": 500, "msg": "no", "data": None}, "all"),
        ({"base_resp": {"status_code": 1008, "status_msg": "no"}, "choices": None}, "all"),
        (body(choice={"error": {"message": "no"}, "finish_reason": "error"}), "choice"),
    ],
)
def test_an_error_with_status_200_is_an_error(row, body_of_error):
    with pytest.raises(NoCompletion) as error:
        read(row)
    assert error.value.body == (row if body_of_error == "all" else row["choices"][0])


@pytest.mark.parametrize("choices", [None, [], [None], "none", [{}]])
def test_a_body_without_a_choice_is_a_reply_without_a_text_and_is_counted(choices):
    found = read({"choices": choices, "usage": {"prompt_tokens": 3, "completion_tokens": 0}})
    assert found.text is None and found.usage == Usage(input_tokens=3)


@pytest.mark.parametrize(
    "content",
    [b"", b"<html>Sign in</html>", b'{"choices": [{"mess', b"[" * 50_000, b"data: {}\n\n", b"\xff"],
)
def test_a_body_that_is_no_json_is_told_by_its_beginning(content):
    with pytest.raises(NoCompletion, match="not JSON, it begins") as error:
        read_completion(content)
    assert error.value.body is None
    with pytest.raises(NoCompletion, match="not an object"):
        read_completion(b"[1]")


def test_a_byte_order_mark_and_broken_characters_do_not_hide_a_reply():
    text = json.dumps(body(message={"content": "半\ud83d个"}))
    assert read_completion(b"\xef\xbb\xbf" + text.encode()).text == "半\ud83d个"
    raw = json.dumps(body(message={"content": "好x"}), ensure_ascii=False).encode()
    assert read_completion(raw.replace(b"x", b"\xb4\xa1")).text == "好\ufffd\ufffd"
