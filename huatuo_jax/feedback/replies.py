"""From a language model's reply to a verdict: what is not exactly what was asked for is refused."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from huatuo_jax.feedback.judgements import CRITERIA, Protocol

Structured = Literal["json_schema", "json_object", "none"]

_FENCE = re.compile(r"```(?:json)?\s*\n(.*)\n\s*```", re.DOTALL)
_THOUGHTS = re.compile(r"\s*<think>.*?</think>", re.DOTALL)
# In a text inside the JSON the quotation marks would be escaped.
_VERDICT = re.compile(rb'"better"\s*:\s*([012])')
_P_FIRST = {1: 1.0, 2: 0.0, 0: 0.5}
# The share of probability that the three verdicts must have together to be renormalised.
_MIN_MASS = 0.5


class Score(NamedTuple):
    """The scores of one answer."""

    scores: dict[str, float]
    reason: str


class Verdict(NamedTuple):
    """Which of two answers is better: the probability that it is the first."""

    p_first: float
    reason: str


class Token(NamedTuple):
    """A token of the reply, and the likeliest tokens at its place with log-probabilities."""

    text: bytes
    alternatives: Mapping[bytes, float]


class BadReply(Exception):
    """The reply is not what was asked for."""


def response_format(
    protocol: Protocol, structured: Structured, *, low: int, high: int
) -> dict[str, Any] | None:
    """What to tell the server about the form of its reply; None for nothing."""
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


def parse_score(text: str, *, low: int, high: int) -> Score:
    """The scores in a reply.

    Raises:
        BadReply: it is not JSON of exactly the five criteria, each with a reason and a whole number
            from `low` to `high`.
    """
    found = _json_object(text)
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
    """The verdict in a reply: 1 for the first, 0 for the second, 0.5 for neither.

    Raises:
        BadReply: it is not JSON of exactly a reason and a verdict of 0, 1 or 2.
    """
    found = _json_object(text)
    _check_fields(found, ("reason", "better"), "the reply")
    better = found["better"]
    if isinstance(better, bool) or not isinstance(better, int) or better not in _P_FIRST:
        raise BadReply(f"better is {_short(better)}, not 0, 1 or 2")
    return Verdict(_P_FIRST[better], _reason(found, "the reply"))


def verdict_probability(tokens: Sequence[Token]) -> float:
    """The probability of the first answer, from the token that holds the verdict.

    The probabilities of "1", "2" and "0" at that place are brought to a sum of 1; half of what
    "0" has goes to each answer.

    Raises:
        BadReply: the tokens hold no verdict, or give most of the probability to something else.
    """
    joined = b"".join(token.text for token in tokens)
    match = _VERDICT.search(joined)
    if match is None:
        raise BadReply("the tokens of the reply hold no verdict")
    place, start = match.start(1), 0
    for token in tokens:
        if start + len(token.text) > place:
            break
        start += len(token.text)
    before = token.text[: place - start]
    mass = dict.fromkeys(_P_FIRST, 0.0)
    for text, log_prob in token.alternatives.items():
        digit = text[len(before) : len(before) + 1]
        if text.startswith(before) and digit in (b"0", b"1", b"2"):
            mass[int(digit)] += math.exp(log_prob)
    total = math.fsum(mass.values())
    # Written so that a log-probability that is no number is refused too.
    if not _MIN_MASS <= total:
        raise BadReply(f"the verdicts have {total:.3f} of the probability at their place")
    return min(max((mass[1] + 0.5 * mass[0]) / total, 0.0), 1.0)


def _json_object(text: str) -> dict[str, Any]:
    thoughts = _THOUGHTS.match(text)
    body = (text if thoughts is None else text[thoughts.end() :]).strip()
    fenced = _FENCE.fullmatch(body)
    if fenced is not None:
        body = fenced[1]
    if not body:
        raise BadReply("the reply is empty")
    try:
        found = json.loads(body, object_pairs_hook=_once, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise BadReply(f"the reply is not JSON: {_short(str(error))}") from error
    if not isinstance(found, dict):
        raise BadReply(f"the reply is {_short(found)}, not a JSON object")
    return found


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
