"""The body of a server's reply to a chat request, field by field as far as each has its type.

The openai client builds its objects out of whatever a server sends and checks nothing, so that a
null or another type at any place would surface later as an error of ours. Here a field that is not
what it should be is as good as absent. Beyond OpenAI's own format: text in parts, token counts
that leave the thoughts out, and errors that come with status 200.
"""

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from huatuo_jax.feedback.replies import Token
from huatuo_jax.feedback.spending import Usage

# No call takes so many; a larger number is no count of tokens.
_MOST_TOKENS = 10**9
_MOST_OF_A_TEXT = 300


class Completion(NamedTuple):
    """What a server replied.

    Attributes:
        text: of the reply; None where it has none.
        refusal: the model's words where it will not answer; None otherwise.
        finish_reason: in the server's words; None where it does not say.
        tokens: of the text with log-probabilities; None where the server gives none.
        usage: the server's count; None where it gives none that can be.
    """

    text: str | None
    refusal: str | None
    finish_reason: str | None
    tokens: tuple[Token, ...] | None
    usage: Usage | None


class NoCompletion(Exception):
    """The body is an error, or nothing that can be read.

    Attributes:
        body: of an error, as JSON; None where the body is not JSON.
        usage: the server's count, where it gives one all the same.
    """

    def __init__(
        self, message: str, *, body: Mapping[str, Any] | None = None, usage: Usage | None = None
    ) -> None:
        """Say what the body is."""
        super().__init__(message)
        self.body, self.usage = body, usage


def read_json(content: bytes) -> Any:
    """The JSON of a body; bytes that are no UTF-8 are marked in its texts.

    Raises:
        NoCompletion: it is not JSON.
    """
    text = content.decode("utf-8-sig", "replace")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        shown = " ".join(text[:_MOST_OF_A_TEXT].split()) or "nothing"
        raise NoCompletion(f"the body is not JSON, it begins {shown!r}") from error


def read_completion(content: bytes) -> Completion:
    """What the body of a reply with status 200 says.

    A body without a choice that can be read is a completion without a text: the server has worked.

    Raises:
        NoCompletion: it is an error, or not a JSON object.
    """
    body = read_json(content)
    if not isinstance(body, dict):
        raise NoCompletion("the body is JSON, but not an object")
    choices = body.get("choices")
    choice = _mapping(choices[0]) if isinstance(choices, list) and choices else {}
    usage = usage_of(body)
    if _is_error(body):
        raise NoCompletion("the body is an error", body=body, usage=usage)
    if choice.get("error"):  # A gateway whose upstream failed in the middle.
        raise NoCompletion("the choice is an error", body=choice, usage=usage)
    message = _mapping(choice.get("message"))
    logprobs = _mapping(choice.get("logprobs"))
    return Completion(
        text=_text_of(message.get("content")),
        refusal=_filled(message.get("refusal")),
        finish_reason=_filled(choice.get("finish_reason")),
        tokens=_tokens_of(logprobs.get("content")),
        usage=usage,
    )


def usage_of(body: Mapping[str, Any]) -> Usage | None:
    """The tokens of a call; None where the server gives no counts that can be.

    Some servers leave the thoughts out of `completion_tokens` and have them in `total_tokens`, or
    only among the details; they are paid for as output all the same.
    """
    usage = _mapping(body.get("usage"))
    details = _mapping(usage.get("completion_tokens_details"))
    prompt, completion, total = (
        _count(usage.get(f"{name}_tokens")) for name in ("prompt", "completion", "total")
    )
    if prompt is None or (completion is None and total is None):
        return None
    told = completion or 0
    thoughts = _count(details.get("reasoning_tokens")) or 0
    output = max(
        told,
        (total or 0) - prompt,
        # More thoughts than output: they cannot be a part of it.
        told + thoughts if thoughts > told else 0,
    )
    in_details = _mapping(usage.get("prompt_tokens_details")).get("cached_tokens")
    cached = _count(in_details) or 0
    if cached > prompt:
        return None
    return Usage(input_tokens=prompt, output_tokens=output, cached_tokens=cached)


def _is_error(body: Mapping[str, Any]) -> bool:
    """Whether a body is an error, as one or another server writes it."""
    # MiniMax has a status in every body, which is 0 where all is well.
    status = _mapping(body.get("base_resp")).get("status_code")
    if body.get("error") or body.get("object") == "error" or status not in (None, 0, "0"):
        return True
    named = [body.get(name) for name in ("message", "msg", "detail", "error_msg")]
    return not body.get("choices") and (body.get("success") is False or any(named))


def _text_of(content: Any) -> str | None:
    """A message's text, also in parts; parts that are thoughts are left out."""
    if isinstance(content, list):
        parts = [_mapping(part) for part in content]
        texts = [part.get("text") for part in parts if part.get("type") in ("text", "output_text")]
        return "".join(text for text in texts if isinstance(text, str)) or None
    return content if isinstance(content, str) else None


def _tokens_of(content: Any) -> tuple[Token, ...] | None:
    if not isinstance(content, list) or not content:
        return None
    tokens = []
    for entry in map(_mapping, content):
        text = _bytes_of(entry)
        if text is None:
            return None  # With a token missing, no place among the others is certain.
        others = entry.get("top_logprobs")
        alternatives = {}
        for one in (entry, *map(_mapping, others if isinstance(others, list) else ())):
            other, log_prob = _bytes_of(one), one.get("logprob")
            if other is not None and isinstance(log_prob, int | float) and _is_number(log_prob):
                alternatives[other] = float(log_prob)
        tokens.append(Token(text, alternatives))
    return tuple(tokens)


def _bytes_of(entry: Mapping[str, Any]) -> bytes | None:
    numbers, text = entry.get("bytes"), entry.get("token")
    if isinstance(numbers, list) and all(
        isinstance(one, int) and not isinstance(one, bool) and 0 <= one < 256 for one in numbers
    ):
        return bytes(numbers)
    return text.encode("utf-8", "surrogatepass") if isinstance(text, str) else None


def _count(value: Any) -> int | None:
    """A count of tokens, also where a server writes it as 12.0."""
    if not _is_number(value) or not 0 <= value <= _MOST_TOKENS or value != int(value):
        return None
    return int(value)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    # An integer of a thousand digits has no float.
    return abs(value) <= 1e300 and math.isfinite(value)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _filled(value: Any) -> str | None:
    return value if isinstance(value, str) and value.strip() else None
