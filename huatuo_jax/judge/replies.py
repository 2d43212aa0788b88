"""Parses a language model's reply into a verdict; anything but the requested format is refused.

Reasoning before the final answer, and a code fence that ends the reply, may surround the JSON.
Everything else makes the reply unreadable, as its meaning would be a guess.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from huatuo_jax.judge.judgements import CRITERIA, Failure, Protocol

Structured = Literal["json_schema", "json_object", "none"]

# White space, the byte order mark, and other marks of no width.
_BLANK = " \t\r\n\v\f\ufeff\u200b\u2060"
# A code fence; `_candidates` takes those that hold an object up to the end of the reply.
_FENCE = re.compile(rf"```[ \t]*[\w+-]*[{_BLANK}]*(?=\{{)")
_FENCE_END = "```"
# Marks around the thoughts of a reasoning model, as models and their servers write them. Where the
# model's template opens them in the prompt, the reply holds the end mark alone.
_THOUGHTS = re.compile(
    r"<(?:think|thinking|thought|reasoning|seed:think)>|◁think▷|\[THINK\]|<unused94>"
    r"|<\|channel\|>analysis<\|message\|>|^## Thinking\b",
    re.IGNORECASE | re.MULTILINE,
)
_THOUGHTS_END = re.compile(
    r"</(?:think|thinking|thought|reasoning|seed:think)>|◁/think▷|\[/THINK\]|<unused95>"
    r"|<\|channel\|>final<\|message\|>|^## Final Response\b",
    re.IGNORECASE | re.MULTILINE,
)
_MOST_CANDIDATES = 32
# In a text inside the JSON the quotation marks would be escaped.
_VERDICT = re.compile(r'"better"\s*:\s*([012])(?!\d)')
# Finish reasons, of OpenAI's and other servers, that mean more than the end of the reply.
_TRUNCATED = frozenset(
    "length max_tokens max_output_tokens max_new_tokens max_length model_length token_limit"
    " model_context_window_exceeded".split()
)
_WITHHELD = frozenset(
    "content_filter content_filtered refusal safety image_safety recitation language sensitive"
    " blocklist prohibited_content spii guardrail_intervened error_toxic".split()
)
_BROKEN_OFF = frozenset(
    "error abort aborted cancelled canceled timeout network_error insufficient_system_resource"
    " tool_calls tool_call function_call tool_use malformed_function_call pause_turn load unload"
    " other".split()
)
_P_FIRST = {1: 1.0, 2: 0.0, 0: 0.5}
# The least probability of the three verdicts together for them to be renormalised.
_MIN_MASS = 0.5
_MAX_MASS = 1.01  # Anything above is not rounding: not probabilities.


class Score(NamedTuple):
    """The scores of one answer."""

    scores: dict[str, float]
    reason: str


class Verdict(NamedTuple):
    """Which of two answers is better: the probability that it is the first."""

    p_first: float
    reason: str


class Token(NamedTuple):
    """A token of the reply, and the likeliest tokens at its position with log-probabilities."""

    text: bytes
    alternatives: Mapping[bytes, float]


class BadReply(Exception):
    """The reply does not have the requested format."""

    def __init__(self, message: str, failure: Failure = "unreadable") -> None:
        """Sets the reason and the kind of failure."""
        super().__init__(message)
        self.failure: Failure = failure


def response_format(
    protocol: Protocol, structured: Structured, *, low: int, high: int
) -> dict[str, Any] | None:
    """Returns the request's field for the reply's format, or None for no field."""
    if structured == "none":
        return None
    if structured == "json_object":
        return {"type": "json_object"}
    return {
        "type": "json_schema",
        "json_schema": {
            "name": protocol,
            "strict": True,
            "schema": _score_schema(low, high) if protocol == "score" else _pairwise_schema(),
        },
    }


def check_ending(finish_reason: str | None) -> None:
    """Accepts a reply by its finish reason if it came to its own end.

    An unknown reason is accepted: the text then shows whether the reply is complete, as truncated
    JSON is not valid.

    Raises:
        BadReply: the server cut the reply off, or withheld a part of it.
    """
    reason = (finish_reason or "").lower().rpartition(".")[2]
    failure: Failure
    if reason in _TRUNCATED:
        failure = "truncated"
    elif reason in _WITHHELD:
        failure = "refused"
    elif reason in _BROKEN_OFF:
        failure = "unreadable"
    else:
        return
    raise BadReply(f"the reply ended for the reason {finish_reason!r}", failure)


def parse_score(text: str, *, low: int, high: int) -> Score:
    """Parses the scores of a reply.

    Raises:
        BadReply: it is not JSON of exactly the five criteria, each with a reason and a whole number
            from `low` to `high`.
    """
    _, found = final_answer(text)
    _check_fields(found, CRITERIA, "the reply")
    scores, reasons = {}, []
    for name in CRITERIA:
        part = found[name]
        if not isinstance(part, dict):
            raise BadReply(f"{name} is {_short(part)}, not an object with reason and score")
        _check_fields(part, ("reason", "score"), name)
        score = part["score"]
        if isinstance(score, bool) or not isinstance(score, int):
            raise BadReply(f"the score of {name} is {_short(score)}, not a whole number")
        if not low <= score <= high:
            raise BadReply(f"the score of {name} is {_short(score)}, outside {low} to {high}")
        scores[name] = float(score)
        reasons.append(f"{name}: {_reason(part, name)}")
    return Score(scores, "\n".join(reasons))


def parse_verdict(text: str) -> Verdict:
    """Parses the verdict of a reply: 1 for the first, 0 for the second, 0.5 for neither.

    Raises:
        BadReply: it is not JSON of exactly a reason and a verdict of 0, 1 or 2.
    """
    _, found = final_answer(text)
    _check_fields(found, ("reason", "better"), "the reply")
    better = found["better"]
    if isinstance(better, bool) or not isinstance(better, int) or better not in _P_FIRST:
        raise BadReply(f"better is {_short(better)}, not 0, 1 or 2")
    return Verdict(_P_FIRST[better], _reason(found, "the reply"))


def verdict_probability(tokens: Sequence[Token], text: str) -> float:
    """Returns the probability of the first answer, from the token that holds the verdict.

    The verdict is that of the final answer, not of the reasoning before it. The probabilities of
    "1", "2" and "0" at its position are normalised to a sum of 1; half of that of "0" goes to each
    answer.

    Args:
        tokens: of the reply; those of reasoning may come first.
        text: of the reply, valid for `parse_verdict`.

    Raises:
        BadReply: the tokens do not hold the verdict of the text, give most of the probability to
            something else, or contradict the verdict: the probability prefers the other answer, or
            makes something else than a stated tie likelier than not.
    """
    answer, _ = final_answer(text)
    match = _VERDICT.search(answer)
    if match is None:
        raise BadReply("the reply has no verdict to find among its tokens")
    joined = b"".join(token.text for token in tokens)
    # From the verdict on, as tokens may split characters of the reason.
    tail = answer[match.start() :].encode("utf-8", "surrogatepass")
    found = joined.rfind(tail)
    behind = joined[found + len(tail) :].decode("utf-8", "replace")
    if found < 0 or _THOUGHTS_END.search(behind):
        raise BadReply("the tokens of the reply do not hold its verdict")
    mass = _masses(tokens, found + len(answer[match.start() : match.start(1)].encode()))
    total = math.fsum(mass.values())
    # Written so that NaN is refused too.
    if not _MIN_MASS <= total <= _MAX_MASS:
        raise BadReply(f"the verdicts have {total:.3f} of the probability at their position")
    p_first = min(max((mass[1] + 0.5 * mass[0]) / total, 0.0), 1.0)
    said = int(match[1])
    other = max(mass[verdict] for verdict in mass if verdict != said) / total
    if (p_first - 0.5) * (_P_FIRST[said] - 0.5) < 0 or (said == 0 and other > 0.5):
        raise BadReply(
            f"the verdict is {said}, but its tokens give the first answer {p_first:.3f} of the"
            " probability"
        )
    return p_first


def _masses(tokens: Sequence[Token], place: int) -> dict[int, float]:
    """Returns the probability of each verdict at a byte position of the joined tokens."""
    start = 0
    for token in tokens:
        if start + len(token.text) > place:
            break
        start += len(token.text)
    before = token.text[: place - start]
    mass = dict.fromkeys(_P_FIRST, 0.0)
    for text, log_prob in token.alternatives.items():
        digit, behind = (text[len(before) + at : len(before) + at + 1] for at in (0, 1))
        if text.startswith(before) and digit in (b"0", b"1", b"2") and not behind.isdigit():
            mass[int(digit)] += math.exp(min(log_prob, 1.0))
    return mass


def final_answer(text: str) -> tuple[str, dict[str, Any]]:
    """Returns the JSON of a reply's final answer, as text and as an object."""
    if not text.strip(_BLANK):
        raise BadReply("the reply is empty")
    error: Exception | None = None
    for candidate in _candidates(text.strip(_BLANK)):
        try:
            found = json.loads(candidate, object_pairs_hook=_once, parse_constant=_no_constant)
        except (BadReply, ValueError, RecursionError) as wrong:
            error = error or wrong
            continue
        if not isinstance(found, dict):
            raise BadReply(f"the reply is {_short(found)}, not a JSON object")
        return candidate, found
    if error is None:
        raise BadReply("the reply has thoughts and no answer")
    if isinstance(error, BadReply):
        raise error
    raise BadReply(f"the reply is not JSON: {_short(str(error))}") from error


def _candidates(text: str) -> Iterator[str]:
    """Yields what may be the final answer, the likeliest first: all, or what follows reasoning.

    Each bare, or in a code fence that ends it. A mark inside the answer's own strings is harmless,
    as the text behind it is not JSON.
    """
    bodies = [] if _THOUGHTS.match(text) else [text]
    ends = [match.end() for match in _THOUGHTS_END.finditer(text)]
    bodies += [text[end:].strip(_BLANK) for end in reversed(ends[-_MOST_CANDIDATES:])]
    for body in filter(None, bodies):
        yield body
        if body.endswith(_FENCE_END):
            fences = list(_FENCE.finditer(body))
            for fence in reversed(fences[-_MOST_CANDIDATES:]):
                if not _within_thoughts(body[: fence.start()]):
                    yield body[fence.end() : -len(_FENCE_END)].strip(_BLANK)


def _within_thoughts(before: str) -> bool:
    """Returns True if reasoning that begins in this text has not ended in it."""
    began = [match.start() for match in _THOUGHTS.finditer(before)]
    ended = [match.start() for match in _THOUGHTS_END.finditer(before)]
    return bool(began) and (not ended or began[-1] > ended[-1])


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise BadReply("the reply has a field twice")
    return found


def _no_constant(name: str) -> None:
    raise BadReply(f"the reply has {name} for a number")


def _check_fields(found: Mapping[str, Any], names: Sequence[str], where: str) -> None:
    lacking = [name for name in names if name not in found]
    unknown = [name for name in found if name not in names]
    if lacking:
        raise BadReply(f"{where} lacks {lacking[0]}")
    if unknown:
        raise BadReply(f"{where} has an unknown field {_short(unknown[0])}")


def _reason(found: Mapping[str, Any], where: str) -> str:
    reason = found["reason"]
    if not isinstance(reason, str):
        raise BadReply(f"the reason of {where} is {_short(reason)}, not text")
    return reason


def _short(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _score_schema(low: int, high: int) -> dict[str, Any]:
    score = {"type": "integer", "enum": list(range(low, high + 1))}
    part = _object_schema({"reason": {"type": "string"}, "score": score})
    return _object_schema(dict.fromkeys(CRITERIA, part))


def _pairwise_schema() -> dict[str, Any]:
    better = {"type": "integer", "enum": [0, 1, 2]}
    return _object_schema({"reason": {"type": "string"}, "better": better})


def _object_schema(properties: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties),
        "additionalProperties": False,
    }
