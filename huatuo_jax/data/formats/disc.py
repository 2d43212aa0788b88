"""Preference pairs from DISC-MedLLM's evaluation: dialogues of several models, judged by GPT-4.

Each model consulted with the same simulated patient on the same cases, and each dialogue was scored
by itself. Two dialogues on one case with different mean scores are a preference pair.
"""

import itertools
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Unpack, cast

from huatuo_jax.data.files import Row, RowError, find_layout, read_rows
from huatuo_jax.data.formats.adapters import LeftOut, disc_scores_of
from huatuo_jax.data.formats.dialogues import Converted, describe
from huatuo_jax.data.formats.preferences import ALL_TIED, SOME_TIED
from huatuo_jax.data.formats.turns import RowProblem, has
from huatuo_jax.data.readers import Keywords, Outcome, Reading, ReadOptions, Used, outcomes_of
from huatuo_jax.data.records import Comparison, Dialogue

NOT_SCORED = "dialogue without a score"
ALONE = "the only scored dialogue of its case"

Path = str | os.PathLike[str]


class _Key(NamedTuple):
    source: str
    id: str
    model: str


@dataclass(frozen=True)
class _Scored:
    """One score row with its dialogue; `mean` is over the judge's criteria, 1 to 5."""

    row: Row
    key: _Key
    dialogue: Dialogue
    mean: float


def read_disc_comparisons(
    dialogues: Sequence[Path], scores: Sequence[Path], **keywords: Unpack[Keywords]
) -> Reading[Comparison]:
    """Reads pairs of dialogues on one case, joined with their scores on (source, id, model).

    The prompt is the patient's first message, `chosen` and `rejected` are the rest of the two
    consultations, `margin` is the difference of the mean scores. The rows counted are those of both
    kinds of files.

    Raises:
        ValueError: as `read_dialogues`.
    """
    options = ReadOptions(**keywords)
    for path in (*dialogues, *scores):
        find_layout(path)
    return Reading(
        file=f"{len(dialogues)} dialogue files and {len(scores)} score files",
        outcomes=lambda: _join(dialogues, scores, options),
        max_error_share=options.max_error_share,
    )


def _join(
    dialogue_files: Sequence[Path], score_files: Sequence[Path], options: ReadOptions
) -> Iterator[Outcome]:
    dialogues: dict[_Key, tuple[Row, Dialogue]] = {}
    for path in dialogue_files:
        for outcome in outcomes_of(path, "dialogue", options):
            if not isinstance(outcome, Used):
                yield outcome
                continue
            dialogue = cast(Dialogue, outcome.converted.records[0])
            key = _dialogue_key(dialogue)
            if key.model == "" or key in dialogues:
                yield RowError(str(path), outcome.line, f"no model, or a second dialogue for {key}")
            else:
                dialogues[key] = (Row(outcome.file, outcome.line, None), dialogue)
    cases: dict[tuple[str, str, str], list[_Scored]] = {}
    scored_keys: set[_Key] = set()
    for path in score_files:
        for row in read_rows(path, split=options.split):
            if isinstance(row, RowError):
                yield row
                continue
            try:
                scored = _scored(row, dialogues, scored_keys)
            except RowProblem as problem:
                yield RowError(row.file, row.line, str(problem))
                continue
            opening = scored.dialogue.messages[0].content
            cases.setdefault((scored.key.source, scored.key.id, opening), []).append(scored)
    for key, (row, _) in dialogues.items():
        if key in scored_keys:
            yield Used(row.file, row.line, "disc dialogue", Converted(()))
        else:
            yield LeftOut(row.line, NOT_SCORED)
    for rows in cases.values():
        yield from _compare(rows, options.source)


def _dialogue_key(dialogue: Dialogue) -> _Key:
    """Returns the key of a dialogue, with the row's own source name."""
    source = dialogue.extra.get("original_source", dialogue.source)
    return _Key(str(source), dialogue.id, str(dialogue.extra.get("model", "")))


def _scored(place: Row, dialogues: dict[_Key, tuple[Row, Dialogue]], taken: set[_Key]) -> _Scored:
    row = place.value
    if not isinstance(row, dict) or not has(row, "source", "id", "model"):
        raise RowProblem(f"{describe(row)}; a score needs source, id, model, scores")
    key = _Key(str(row["source"]), str(row["id"]), str(row["model"]))
    if key not in dialogues:
        raise RowProblem(f"no dialogue for {key}")
    if key in taken:
        raise RowProblem(f"a second score for {key}")
    scores = disc_scores_of(row)
    taken.add(key)
    return _Scored(place, key, dialogues[key][1], math.fsum(scores.values()) / len(scores))


def _compare(rows: Sequence[_Scored], source: str | None) -> Iterator[Outcome]:
    """Yields all pairs of one case with its first row; the others are used without records."""
    ranked = sorted(rows, key=lambda row: -row.mean)
    pairs = tuple(
        _comparison(better, worse, source)
        for better, worse in itertools.combinations(ranked, 2)
        if better.mean > worse.mean and better.dialogue.messages != worse.dialogue.messages
    )
    if not pairs:
        reason = ALONE if len(rows) == 1 else ALL_TIED
        yield from (LeftOut(one.row.line, reason) for one in rows)
        return
    repairs = (SOME_TIED,) if len(pairs) < math.comb(len(rows), 2) else ()
    for number, one in enumerate(rows):
        converted = Converted(pairs, repairs) if number == 0 else Converted(())
        yield Used(one.row.file, one.row.line, "disc score", converted)


def _comparison(better: _Scored, worse: _Scored, source: str | None) -> Comparison:
    own_source, row_id, model = better.key
    return Comparison(
        id=f"{own_source}/{row_id}:{model}>{worse.key.model}",
        messages=better.dialogue.messages[:1],
        chosen=better.dialogue.messages[1:],
        rejected=worse.dialogue.messages[1:],
        source=source or own_source,
        margin=better.mean - worse.mean,
        extra={"chosen_model": model, "rejected_model": worse.key.model},
    )
