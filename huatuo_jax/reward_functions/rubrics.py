"""The score of a response from the criteria of a rubric that it meets, by the published rules.

The rules differ in what the points of the met criteria are divided by, and in where a response's
score is bounded: HealthBench bounds only the mean over responses, so that one response may score
below 0; HuatuoGPT-3 bounds each.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

Denominator = Literal["positive", "all", "absolute"]
Missing = Literal["no_score", "left_out", "unmet"]
Met = bool | float | None
"""Whether a criterion is met, or to which share from 0 to 1; None where nobody could say."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RubricRule:
    """From criteria met to a score.

    Attributes:
        denominator: what the points that were gained are divided by: the `positive` points of the
            rubric, `all` its points as they are, or their `absolute` values.
        low: least score of a response; None for no bound.
        high: greatest score of a response; None for no bound.
        missing: what becomes of a criterion without a verdict: the response has `no_score`, the
            criterion is `left_out` of both sums, or it counts as `unmet`.
    """

    denominator: Denominator = "positive"
    low: float | None = None
    high: float | None = None
    missing: Missing = "no_score"

    def __post_init__(self) -> None:
        """Raises ValueError for bounds that leave nothing between them."""
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise ValueError(f"low={self.low!r} must be below high={self.high!r}")

    def whole(self, points: Sequence[float]) -> float:
        """Returns the denominator of criteria worth so many points."""
        if self.denominator == "positive":
            return math.fsum(one for one in points if one > 0)
        if self.denominator == "absolute":
            return math.fsum(map(abs, points))
        return math.fsum(points)

    def check(self, criteria: Sequence[str], points: Sequence[float]) -> None:
        """Raises ValueError where a rubric has no score by this rule, or a criterion twice.

        Args:
            criteria: their texts.
            points: of each.
        """
        if len(criteria) != len(points):
            raise ValueError(f"{len(criteria)} criteria and {len(points)} points must be as many")
        if not all(map(math.isfinite, points)):
            raise ValueError(f"points={list(points)!r} must be numbers")
        twice = {one for one in criteria if criteria.count(one) > 1}
        if twice:
            raise ValueError(f"criterion {min(twice)!r} must stand in the rubric once")
        if not self.whole(points) > 0:
            raise ValueError(
                f"points={list(points)!r} must come to more than 0 by "
                f"denominator={self.denominator!r}: their score is divided by that"
            )

    def score(self, points: Sequence[float], met: Sequence[Met]) -> float | None:
        """Scores a response.

        Args:
            points: of each criterion, negative for what a response should not do.
            met: of each criterion.

        Returns:
            The points gained over the denominator, bounded; None where the rule has no score for
            the verdicts there are.

        Raises:
            ValueError: not one verdict a criterion, or a share that is not from 0 to 1.
        """
        if len(points) != len(met):
            raise ValueError(f"{len(met)} verdicts must be {len(points)}, one for each criterion")
        verdicts = [0.0 if one is None and self.missing == "unmet" else one for one in met]
        if self.missing == "no_score" and None in verdicts:
            return None
        judged = [(p, float(m)) for p, m in zip(points, verdicts, strict=True) if m is not None]
        for _, share in judged:
            if not 0 <= share <= 1:
                raise ValueError(f"verdict {share!r} must be from 0 to 1")
        whole = self.whole([p for p, _ in judged])
        if not whole > 0:
            return None
        score = math.fsum(p * share for p, share in judged) / whole
        if self.low is not None:
            score = max(score, self.low)
        return score if self.high is None else min(score, self.high)


HUATUOGPT_3 = RubricRule(denominator="positive", low=0.0, high=1.0)
"""OnePO's grader: each response is bounded to 0 and 1, and has no score without all verdicts."""

HEALTHBENCH = RubricRule(denominator="positive", missing="left_out")
"""HealthBench: no bound of a response; what was not judged is left out."""

RUBRICS_AS_REWARDS = RubricRule(denominator="all")
"""RaR (arXiv 2507.17746), the explicit form; pitfalls are worded so that to meet them is good."""

OPEN_INSTRUCT = RubricRule(denominator="absolute", missing="unmet")
"""open-instruct's verifier: a criterion whose judge failed keeps its weight and counts 0."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Importance:
    """Weights of RaR's four classes; reimplementations disagree on them.

    Attributes:
        essential: of what a response must do.
        important: of what it should do.
        optional: of what it may do.
        pitfall: of a mistake that it avoids.
    """

    essential: float = 1.0
    important: float = 0.7
    optional: float = 0.3
    pitfall: float = 0.9

    def points(self, names: Sequence[str]) -> list[float]:
        """Returns the weights of criteria by their class, in any case.

        Raises:
            ValueError: another class.
        """
        weights = dataclasses.asdict(self)
        found = []
        for name in names:
            key = name.strip().lower()
            if key not in weights:
                raise ValueError(f"importance {name!r} must be one of {list(weights)}")
            found.append(weights[key])
        return found
