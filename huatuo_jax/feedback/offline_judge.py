"""The offline judge: a fixed rubric of measurable properties, no model and no network.

It is named for what it is, `offline-rubric-v1`, in every record. It lets the whole recipe run and
be tested for nothing; it is no substitute for a judge that reads. What it measures is in
`huatuo_jax.feedback.rubric`, how much each property counts is `WEIGHTS`.

Its one property about content is the agreement with the reference or the diagnosis. Without either
it measures form, and form alone does not tell the better answer: on published preference pairs
without references it does no better than chance.
"""

import dataclasses
import functools
import inspect
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from huatuo_jax.data.records import Prompt
from huatuo_jax.feedback import rubric
from huatuo_jax.feedback.judgements import Protocol, sha256
from huatuo_jax.feedback.judges import NOTHING, Estimate, Reply

NAME = "offline-rubric-v1"
CAVEAT = "measurable properties only, no substitute for a judge"

SCALE = (1.0, 5.0)
# How much each property counts for a criterion. A property that does not apply (no reference, no
# information missing) leaves its weight to the others.
WEIGHTS: Mapping[str, Mapping[str, float]] = {
    "informative": {"agreement": 0.5, "length": 0.5},
    "coherent": {"repetition": 0.5, "structure": 0.5},
    "preferred": {"asks_back": 0.4, "structure": 0.3, "length": 0.3},
    "accurate": {"agreement": 1.0},
}
# The whole leans on accuracy, as the instruction to a judge does.
OVERALL: Mapping[str, float] = {
    "informative": 0.2,
    "coherent": 0.2,
    "preferred": 0.2,
    "accurate": 0.4,
}
# Log-odds of a comparison for each point of difference: one point is 88 to 12.
LOG_ODDS_PER_POINT = 2.0


class OfflineJudge:
    """Scores and compares answers by the rubric; the same texts always get the same verdict."""

    @property
    def name(self) -> str:
        """`offline-rubric-v1`."""
        return NAME

    @property
    def settings(self) -> Mapping[str, Any]:
        """The name and the hash of the rubric: other code is another judge, with other labels."""
        return {"judge": NAME, "note": CAVEAT, "rubric": _rubric_hash()}

    def template_hash(self, protocol: Protocol) -> str:
        """Hash of the rubric, which stands for a prompt template."""
        return sha256(f"{NAME} {protocol} {_rubric_hash()}")

    def estimate(self, prompt: Prompt, texts: Sequence[str]) -> Estimate:
        """Nothing: no request, no token, no money."""
        return NOTHING

    async def score(self, prompt: Prompt, answer: str) -> Reply:
        """The answer's scores, 1 to 5, not rounded."""
        return Reply(scores=score_answer(prompt, answer), reason=explain(prompt, answer), cost=0.0)

    async def compare(self, prompt: Prompt, first: str, second: str) -> Reply:
        """The probability that the first is better; 1 minus that of the other order, exactly."""
        overall = [score_answer(prompt, text)["overall"] for text in (first, second)]
        reason = (
            f"{NAME} ({CAVEAT}): first {overall[0]:.3f}, second {overall[1]:.3f} of {SCALE[1]:g}"
        )
        return Reply(p_first=preference(*overall), reason=reason, cost=0.0)

    async def close(self) -> None:
        """There is nothing to let go of."""


def score_answer(prompt: Prompt, answer: str) -> dict[str, float]:
    """Scores on a scale of 1 to 5 for each criterion and the whole.

    A criterion is 1 + 4 times the weighted mean of its properties, `accurate` that of its mean
    times the safety of the wording; without reference and diagnosis it is the safety alone.
    `overall` is the weighted mean of the criteria. An answer without a letter gets the lowest score
    everywhere.
    """
    lowest, highest = SCALE
    if not rubric.plain(answer):
        return dict.fromkeys((*WEIGHTS, "overall"), lowest)
    found = rubric.measure(prompt, answer)
    shares = {criterion: _weighted_mean(weights, found) for criterion, weights in WEIGHTS.items()}
    shares["accurate"] *= found.safety
    shares["overall"] = math.fsum(OVERALL[name] * share for name, share in shares.items())
    return {name: lowest + (highest - lowest) * share for name, share in shares.items()}


def explain(prompt: Prompt, answer: str) -> str:
    """The measurements behind a score, in one line."""
    fields = dataclasses.asdict(rubric.measure(prompt, answer))
    flags = fields.pop("flags")
    parts = [
        f"{name} {'does not apply' if value is None else format(value, '.3f')}"
        for name, value in fields.items()
    ]
    return f"{NAME} ({CAVEAT}): {', '.join(parts)}; unsafe wording: {', '.join(flags) or 'none'}"


def preference(first: float, second: float) -> float:
    """The probability that the first is better: a logistic function of the scores' difference.

    `preference(a, b) + preference(b, a)` is 1 without rounding error.
    """
    better = 1.0 / (1.0 + math.exp(-LOG_ODDS_PER_POINT * abs(first - second)))
    return better if first >= second else 1.0 - better


def _weighted_mean(weights: Mapping[str, float], found: rubric.Measurements) -> float:
    """1 where none of the properties applies."""
    values = {name: getattr(found, name) for name in weights}
    applying = {name: value for name, value in values.items() if value is not None}
    total = math.fsum(weights[name] for name in applying)
    if not applying:
        return 1.0
    return math.fsum(weights[name] * value for name, value in applying.items()) / total


@functools.cache
def _rubric_hash() -> str:
    return sha256(inspect.getsource(sys.modules[__name__]))
