"""HealthBench: reads rows with signed rubrics, and scores a grader's verdicts on them.

A row's score is the sum of the points of the criteria that are met over the sum of the positive
points, so it may lie below 0; the figure is the mean over rows, and only this mean is clipped to
0 and 1 (arXiv 2505.08775 and its released scorer).

A criterion whose verdict is None (the grader's reply could not be parsed) counts as neither met nor
unmet: the row is scored as if its rubric had only the judged criteria, and has no score where no
judged criterion has positive points. The figures count such criteria, name the rows, and state
between which two values the figure would lie whatever the missing verdicts were.
"""

import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from huatuo_jax.core.files import Line, read_lines
from huatuo_jax.data.records import Message, shown
from huatuo_jax.reward_functions.rubric_grading import PROMPT_VERSIONS, Calls, Criterion
from huatuo_jax.reward_functions.rubrics import HEALTHBENCH

Subset = Literal["all", "hard", "consensus"]

LENGTH_PENALTIES: Mapping[Subset, float] = {"all": 0.0299, "hard": 0.0392, "consensus": 0.0020}
"""The cost of 500 characters of response in the length-adjusted score, by set."""
LENGTH_CENTER = 2000
"""The number of characters at which the length-adjusted score is the score."""
LENGTH_UNIT = 500

CONSENSUS_TAG = "level:cluster"
"""Marks the criteria that several physicians agreed on."""
OVERALL = "overall_score"

_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, kw_only=True)
class HealthBenchConfig:
    """Settings of the suite.

    Attributes:
        calls: one call a `criterion`, as in the released grader, or one call a `row`, which judges
            all its criteria at once.
        subset: the set that the rows are of; it decides the length penalty.
        num_resamples: of the bootstrap over rows.
        seed: of the bootstrap.
    """

    calls: Calls = "criterion"
    subset: Subset = "all"
    num_resamples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        """Validates the fields."""
        if self.calls not in ("criterion", "row"):
            raise ValueError(f"calls is {self.calls!r}; it should be 'criterion' or 'row'")
        if self.subset not in LENGTH_PENALTIES:
            names = ", ".join(LENGTH_PENALTIES)
            raise ValueError(f"subset is {self.subset!r}; it should be one of {names}")
        if self.num_resamples < 2:
            raise ValueError(f"num_resamples is {self.num_resamples}; it should be 2 or more")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it should be 0 or more")


@dataclass(frozen=True)
class HealthBenchRow:
    """One conversation with its rubric.

    Attributes:
        prompt_id: unique in its file.
        messages: the conversation up to the response.
        criteria: at least one with positive points.
        example_tags: such as `theme:hedging`.
    """

    prompt_id: str
    messages: tuple[Message, ...]
    criteria: tuple[Criterion, ...]
    example_tags: tuple[str, ...]

    @property
    def duplicate_criteria(self) -> tuple[str, ...]:
        """The texts of the criteria that the rubric has more than once; each counts every time."""
        counts = Counter(criterion.text for criterion in self.criteria)
        return tuple(text for text, count in counts.items() if count > 1)


class ClippedMean(NamedTuple):
    """A mean over rows, clipped to 0 and 1.

    Attributes:
        value: the clipped mean.
        low: of its 95 % interval, percentiles of the resampled means.
        high: of the same.
        bootstrap_std: the standard deviation of the resampled means, each clipped.
        num_rows: that have a value.
    """

    value: float
    low: float
    high: float
    bootstrap_std: float
    num_rows: int

    def to_json(self) -> dict[str, float | int]:
        """The numbers by name."""
        return self._asdict()


def read_healthbench(path: str | os.PathLike[str]) -> list[HealthBenchRow]:
    """Reads a JSON Lines file of HealthBench: the whole set, the hard or the consensus subset.

    Raises:
        ValueError: a line of another layout, a `prompt_id` that occurs twice, or a rubric without
            positive points; with file, line and `prompt_id`.
        OSError: the file cannot be read.
    """
    found: dict[str, HealthBenchRow] = {}
    for line in read_lines(path, unfinished="read"):
        try:
            row = _row(line)
            if row.prompt_id in found:
                raise ValueError(f"prompt_id {row.prompt_id!r} occurs twice")
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}:{line.number}: {error}") from error
        found[row.prompt_id] = row
    if not found:
        raise ValueError(f"{os.fspath(path)}: holds no rows of HealthBench")
    return list(found.values())


def consensus_subset(rows: Iterable[HealthBenchRow]) -> list[HealthBenchRow]:
    """Keeps of each row the criteria that physicians agreed on, and the rows that have any.

    The released consensus file has exactly such rows; it can also be read as it is.
    """
    found = []
    for row in rows:
        criteria = tuple(one for one in row.criteria if CONSENSUS_TAG in one.tags)
        if criteria:
            _check_points(row.prompt_id, criteria)
            found.append(replace(row, criteria=criteria))
    return found


def rows_named(rows: Iterable[HealthBenchRow], prompt_ids: Iterable[str]) -> list[HealthBenchRow]:
    """Returns the rows with these ids in the order of the ids, such as those of the hard subset.

    Raises:
        ValueError: an id that no row has.
    """
    by_id = {row.prompt_id: row for row in rows}
    prompt_ids = list(prompt_ids)
    unknown = [name for name in prompt_ids if name not in by_id]
    if unknown:
        raise ValueError(
            f"{len(unknown)} of {len(prompt_ids)} prompt_ids are not in the set, the first is"
            f" {unknown[0]!r}"
        )
    return [by_id[name] for name in prompt_ids]


# Scores.


def row_score(criteria: Sequence[Criterion], verdicts: Sequence[bool | None]) -> float | None:
    """Met points over positive points, among the judged criteria; None without positive points."""
    return HEALTHBENCH.score([criterion.points for criterion in criteria], verdicts)


def row_metrics(row: HealthBenchRow, verdicts: Sequence[bool | None]) -> dict[str, float]:
    """Returns the scores of a row by name.

    `overall_score` and each example tag have the row's score; each tag of the rubric the score of
    the criteria that bear it, and none where these have no positive points.
    """
    metrics: dict[str, float] = {}
    overall = row_score(row.criteria, verdicts)
    if overall is not None:
        metrics[OVERALL] = overall
        metrics.update(dict.fromkeys(row.example_tags, overall))
    tagged: dict[str, list[int]] = defaultdict(list)
    for index, criterion in enumerate(row.criteria):
        for tag in dict.fromkeys(criterion.tags):
            tagged[tag].append(index)
    for tag, places in tagged.items():
        score = row_score([row.criteria[i] for i in places], [verdicts[i] for i in places])
        if score is not None:
            metrics[tag] = score
    return metrics


def score_bounds(
    criteria: Sequence[Criterion], verdicts: Sequence[bool | None]
) -> tuple[float, float]:
    """The least and the greatest score that a row of these verdicts has once all are judged."""
    scores = [
        row_score(
            criteria,
            [
                (criterion.points > 0) == best if met is None else met
                for criterion, met in zip(criteria, verdicts, strict=True)
            ],
        )
        for best in (False, True)
    ]
    assert scores[0] is not None and scores[1] is not None
    return scores[0], scores[1]


def length_adjusted(score: float, num_characters: int, *, penalty: float) -> float:
    """The score less a penalty for each 500 characters beyond 2,000; shorter responses gain."""
    return score - penalty * (num_characters - LENGTH_CENTER) / LENGTH_UNIT


def clipped_mean(values: Sequence[float], *, num_resamples: int, seed: int) -> ClippedMean:
    """Clips the mean of the rows' values to 0 and 1, with a seeded bootstrap over rows.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("values: a mean needs at least one")
    values_N = np.asarray(values, np.float64)
    draw = np.random.default_rng(seed)
    means_R = np.array(
        [
            values_N[draw.integers(0, len(values_N), size=len(values_N))].mean()
            for _ in range(num_resamples)
        ],
        np.float64,
    ).clip(0.0, 1.0)
    low, high = np.quantile(means_R, (0.025, 0.975))
    value = float(values_N.mean().clip(0.0, 1.0))
    return ClippedMean(value, float(low), float(high), float(means_R.std()), len(values_N))


def healthbench_figures(
    rows: Sequence[HealthBenchRow],
    verdicts: Mapping[str, Sequence[bool | None]],
    responses: Mapping[str, str],
    cfg: HealthBenchConfig,
) -> dict[str, Any]:
    """Computes the figures of one model.

    Args:
        rows: that were answered.
        verdicts: by `prompt_id`, one a criterion; None where there is none.
        responses: by `prompt_id`, the texts that were graded.
        cfg: the settings.

    Returns:
        `score` and `length_adjusted` (`ClippedMean` as JSON; None where no row has a score), `tags`
        by name, and the counts and names of what was not judged.

    Raises:
        ValueError: a row without a response, or without one verdict a criterion.
    """
    _check_complete(rows, verdicts, responses)
    penalty = LENGTH_PENALTIES[cfg.subset]
    by_name: dict[str, list[float]] = defaultdict(list)
    adjusted: list[float] = []
    without_score = []
    for row in rows:
        metrics = row_metrics(row, verdicts[row.prompt_id])
        for name, value in metrics.items():
            by_name[name].append(value)
        if OVERALL in metrics:
            length = len(responses[row.prompt_id])
            adjusted.append(length_adjusted(metrics[OVERALL], length, penalty=penalty))
        else:
            without_score.append(row.prompt_id)
    unjudged = {
        row.prompt_id: count
        for row in rows
        if (count := sum(met is None for met in verdicts[row.prompt_id]))
    }
    bounds = [score_bounds(row.criteria, verdicts[row.prompt_id]) for row in rows]

    def figure(values: Sequence[float]) -> dict[str, float | int] | None:
        if not values:
            return None
        mean = clipped_mean(values, num_resamples=cfg.num_resamples, seed=cfg.seed)
        return mean.to_json()

    overall = by_name.pop(OVERALL, [])
    return {
        "score": figure(overall),
        "length_adjusted": figure(adjusted),
        "length_penalty": penalty,
        "tags": {name: figure(values) for name, values in sorted(by_name.items())},
        "num_rows": len(rows),
        "num_criteria": sum(len(row.criteria) for row in rows),
        "num_unjudged": sum(unjudged.values()),
        "unjudged": unjudged,
        "rows_without_score": without_score,
        "score_if_all_were_judged": [
            float(np.clip(math.fsum(side) / len(side), 0.0, 1.0))
            for side in zip(*bounds, strict=True)
        ],
        "duplicate_criteria": {
            row.prompt_id: list(row.duplicate_criteria) for row in rows if row.duplicate_criteria
        },
        "calls": cfg.calls,
        "subset": cfg.subset,
        "prompt_version": PROMPT_VERSIONS[cfg.calls],
        "bootstrap": {"resampled": "rows", "num": cfg.num_resamples, "seed": cfg.seed},
    }


def _check_complete(
    rows: Sequence[HealthBenchRow],
    verdicts: Mapping[str, Sequence[bool | None]],
    responses: Mapping[str, str],
) -> None:
    if not rows:
        raise ValueError("rows: there are none to score")
    for row in rows:
        if row.prompt_id not in responses:
            raise ValueError(f"row {row.prompt_id!r} has no response")
        given = len(verdicts[row.prompt_id]) if row.prompt_id in verdicts else 0
        if given != len(row.criteria):
            raise ValueError(
                f"row {row.prompt_id!r} has {given} verdicts for {len(row.criteria)} criteria"
            )


# Rows of a file.


def _row(line: Line) -> HealthBenchRow:
    for name in ("prompt_id", "prompt", "rubrics", "example_tags"):
        if name not in line.row:
            raise ValueError(
                f"no field {name!r}; a row of HealthBench has prompt_id, prompt, rubrics and"
                " example_tags"
            )
    name = line.row["prompt_id"]
    if not isinstance(name, str) or not name:
        raise ValueError(f"prompt_id is {shown(repr(name))}; it should be text")
    try:
        criteria = tuple(map(_criterion, _list(line.row, "rubrics")))
        _check_points(name, criteria)
        return HealthBenchRow(
            name,
            tuple(map(_message, _list(line.row, "prompt"))),
            criteria,
            _tags(line.row["example_tags"], "example_tags"),
        )
    except ValueError as error:
        prefix = "" if repr(name) in str(error) else f"prompt_id {name!r}: "
        raise ValueError(f"{prefix}{error}") from error


def _check_points(name: str, criteria: Sequence[Criterion]) -> None:
    if not any(criterion.points > 0 for criterion in criteria):
        raise ValueError(
            f"prompt_id {name!r}: no criterion of its rubric has positive points, so it has no"
            " score; remove the row"
        )


def _list(row: Mapping[str, Any], name: str) -> list[Any]:
    value = row[name]
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name} is {shown(repr(value))}; it should be a list that is not empty")
    return value


def _message(value: object) -> Message:
    role = value.get("role") if isinstance(value, dict) else None
    content = value.get("content") if isinstance(value, dict) else None
    if role not in _ROLES or not isinstance(content, str):
        raise ValueError(
            f"prompt has {shown(repr(value))}; each message should have a role"
            f" ({', '.join(_ROLES)}) and a content that is text"
        )
    return Message(role, content)


def _criterion(value: object) -> Criterion:
    if not isinstance(value, dict) or not {"criterion", "points", "tags"} <= set(value):
        raise ValueError(
            f"rubrics has {shown(repr(value))}; each should have criterion, points and tags"
        )
    text, points = value["criterion"], value["points"]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"a criterion is {shown(repr(text))}; it should be text")
    number = isinstance(points, int | float) and not isinstance(points, bool)
    if not number or not math.isfinite(points):
        raise ValueError(
            f"the points of {shown(text)!r} are {shown(repr(points))}; they should be a number"
        )
    return Criterion(text, float(points), _tags(value["tags"], "tags"))


def _tags(value: object, name: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(tag, str) for tag in value):
        raise ValueError(f"{name} is {shown(repr(value))}; it should be a list of texts")
    return tuple(value)
