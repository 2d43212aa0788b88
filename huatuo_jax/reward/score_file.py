"""Reward scores of every answer in a file, by any reward model on disk."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from huatuo_jax import multi_host, sharding
from huatuo_jax.backbone.config import ComputeConfig
from huatuo_jax.backbone.transformer import Transformer
from huatuo_jax.checkpoint import models
from huatuo_jax.checkpoint.tokenizer import load_tokenizer
from huatuo_jax.comparisons.data import AnswersConfig, DialogueTokens, tokenize_answers
from huatuo_jax.data.chat import TruncationPolicy
from huatuo_jax.data.records import Messages
from huatuo_jax.progress import progress_bar
from huatuo_jax.reward.answers import Answered, read_answered
from huatuo_jax.scoring import GivenAnswer, Normalization, Scorer, load_normalization


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """A file of answers to score.

    Attributes:
        model: folder of a reward model of ours, or of transformers' sequence classification with
            one label, or a hub id.
        input: file of dialogues, of comparisons, or of several answers a prompt.
        encoding: of the input; None tells it by evidence, see `huatuo_jax.data.encodings`.
        output: JSON Lines to write; replaced when all is scored.
        template: chat template by name; `tokenizer` for the tokenizer's own.
        truncation: what becomes of a dialogue longer than `max_length`.
        max_length: tokens of a dialogue; None for the model's positions.
        rows_at_once: rows that go through the model together, a multiple of the mesh's shards.
        row_length: tokens of a row, which holds several answers; None for the longest's.
        compute_dtype: None for float32 on CPU, bfloat16 elsewhere.
        data: mesh axis, see `sharding.make_mesh`.
        fsdp: mesh axis.
        tensor: mesh axis.
    """

    model: str
    input: str
    output: str
    encoding: str | None = None
    template: str = "huatuogpt"
    truncation: TruncationPolicy = "drop_oldest_turns"
    max_length: int | None = None
    rows_at_once: int = 8
    row_length: int | None = None
    compute_dtype: str | None = None
    data: int = 1
    fsdp: int = -1
    tensor: int = 1

    def __post_init__(self) -> None:
        """Raise ValueError for a size or an output that cannot be."""
        if not self.output or os.path.isdir(self.output):
            raise ValueError(f"output={self.output!r} is no name of a file to write")
        if os.path.realpath(self.input) == os.path.realpath(self.output):
            raise ValueError(f"input and output are both {self.output}; they should differ")
        for name in ("max_length", "rows_at_once", "row_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")


class Scored(NamedTuple):
    """What was done: records, answers, answers without a score, and the mean of the others."""

    num_records: int
    num_answers: int
    num_without: int
    mean: float | None

    def __str__(self) -> str:
        """One line."""
        line = f"{self.num_records} records, {self.num_answers} answers"
        if self.num_without:
            line += f", {self.num_without} of them without a score (too long, or not to be said)"
        return line if self.mean is None else f"{line}, mean score {self.mean:.4f}"


def score_file(cfg: ScoreConfig) -> Scored:
    """Writes each record of the input with the scores of its answers.

    A dialogue gets `score`, a record of several answers `scores` in their order (of a comparison:
    chosen, rejected). They are raw; where the model was stored with a normalization,
    `normalized_score` or `normalized_scores` stands beside them. An answer that does not fit, or
    that the template cannot say, has null.

    Raises:
        ValueError: a file, model or setting that cannot be, before anything is compiled.
        FileNotFoundError: there is no such model.
        OSError: the output cannot be written.
    """
    info = models.find_model(cfg.model)
    if info.head != "score":
        raise ValueError(
            f"{cfg.model}: this model has a token head; scoring needs a reward model (ours, or "
            "ForSequenceClassification with one label)"
        )
    normalization = load_normalization(info.folder)
    mesh = sharding.make_mesh(data=cfg.data, fsdp=cfg.fsdp, tensor=cfg.tensor)
    limit = cfg.max_length or min(info.cfg.max_positions, cfg.row_length or info.cfg.max_positions)
    if limit > info.cfg.max_positions:
        raise ValueError(
            f"max_length={limit} must be at most the model's {info.cfg.max_positions} positions"
        )
    answers_cfg = AnswersConfig(template=cfg.template, truncation=cfg.truncation, max_length=limit)
    records = list(read_answered(cfg.input, encoding=cfg.encoding))
    dialogues = [dialogue for record in records for dialogue in record.dialogues]
    if not dialogues:
        raise ValueError(f"{cfg.input}: none of its records has an answer to score")
    tokens = tokenize_answers(dialogues, answers_cfg, load_tokenizer(info.folder))
    unsayable = [found for found in tokens.values() if isinstance(found, str)]
    if len(unsayable) == len(tokens):
        raise ValueError(
            f"{cfg.input}: none of its {len(dialogues)} answers can be scored with"
            f" max_length={limit}: {', '.join(sorted(set(unsayable)))}"
        )
    default = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    compute = ComputeConfig(compute_dtype=jnp.dtype(cfg.compute_dtype or default))
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    scorer = Scorer(
        Transformer(info.cfg, compute),
        {"params": models.load_params(info, mesh=mesh)},
        mesh=mesh,
        rows_at_once=-(-cfg.rows_at_once // shards) * shards,
        row_length=cfg.row_length,
    )
    scores = _scores(scorer, tokens)
    multi_host.by_first(
        "scores", lambda: _write(cfg.output, _scored_records(records, scores, normalization))
    )
    found = [scores[dialogue] for dialogue in dialogues]
    known = [score for score in found if score is not None]
    mean = sum(known) / len(known) if known else None
    return Scored(len(records), len(found), len(found) - len(known), mean)


def _scores(
    scorer: Scorer, tokens: dict[Messages, DialogueTokens | str]
) -> dict[Messages, float | None]:
    """The raw score of each dialogue, None for one that has no tokens."""
    scores: dict[Messages, float | None] = dict.fromkeys(tokens)
    sayable = {key: found for key, found in tokens.items() if not isinstance(found, str)}
    with progress_bar(f"scoring {len(sayable)} answers", "rows") as on_progress:
        found = scorer.scores(
            [GivenAnswer(one.token_ids, 0) for one in sayable.values()], on_progress
        )
    return scores | dict(zip(sayable, map(float, found), strict=True))


def _scored_records(
    records: Sequence[Answered],
    scores: dict[Messages, float | None],
    normalization: Normalization | None,
) -> Iterator[dict[str, Any]]:
    for record in records:
        raw = [scores[dialogue] for dialogue in record.dialogues]
        fields: dict[str, list[float | None]] = {"score": raw}
        if normalization is not None:
            fields["normalized_score"] = [
                None if one is None else float(normalization.apply(one)) for one in raw
            ]
        yield record.record | {
            f"{name}s" if record.several else name: values if record.several else values[0]
            for name, values in fields.items()
        }


def _write(output: str, records: Iterator[dict[str, Any]]) -> None:
    path = pathlib.Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.tmp")
    with beside.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
    os.replace(beside, path)
