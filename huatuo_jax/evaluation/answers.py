"""The answers that an evaluation looks at: drawn from each model, scored by the reward model."""

import dataclasses
import pathlib
import sys
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from huatuo_jax import multi_host
from huatuo_jax.data.readers import read_prompts
from huatuo_jax.evaluation.config import EvaluationConfig
from huatuo_jax.feedback.intervals import Values
from huatuo_jax.feedback.questions import Answered, read_answered
from huatuo_jax.generation.bulk import BulkConfig, run_bulk
from huatuo_jax.generation.requests import SamplingConfig
from huatuo_jax.json_lines import read_rows, write_rows
from huatuo_jax.progress import tell
from huatuo_jax.reward.score_file import ScoreConfig, score_file
from huatuo_jax.rl.rewards import AnswerScoreConfig
from huatuo_jax.scoring import GivenAnswer

REFERENCE = "reference"
"""In place of a model's name: the answers that stand in the data."""

SCORE_FIELDS = ("scores", "normalized_scores", "rewards")
"""What a record of scored answers has for each of them, beside the answers themselves."""


class ScoredAnswers(NamedTuple):
    """One model's answers in the order of the prompts.

    Attributes:
        answered: prompts and texts.
        rewards: what PPO's reward holds of the reward model's scores, see `score_file`.
        records: of the file, each with `answers` and `prompt_token_ids`.
    """

    answered: list[Answered]
    rewards: Values
    records: list[dict[str, Any]]

    @property
    def texts(self) -> list[str]:
        """All texts."""
        return [text for one in self.answered for text in one.answers]

    @property
    def characters(self) -> Values:
        """The length of each text."""
        return {one.prompt.id: [float(len(t)) for t in one.answers] for one in self.answered}

    def field(self, name: str, matching: str) -> Values:
        """1 for each answer whose field has this value, 0 for the others."""
        return {
            record["id"]: [float(answer[name] == matching) for answer in record["answers"]]
            for record in self.records
        }

    def only(self, ids: Collection[str]) -> "ScoredAnswers":
        """Those to some of the prompts."""
        return ScoredAnswers(
            [one for one in self.answered if one.prompt.id in ids],
            {name: found for name, found in self.rewards.items() if name in ids},
            [record for record in self.records if record["id"] in ids],
        )

    def pick(self, places: Mapping[str, slice]) -> "ScoredAnswers":
        """Some of the answers to each prompt, by its id: in the records, too."""
        return ScoredAnswers(
            [
                dataclasses.replace(
                    one,
                    answers=one.answers[places[one.prompt.id]],
                    sampled=one.sampled[places[one.prompt.id]],
                )
                for one in self.answered
            ],
            {name: found[places[name]] for name, found in self.rewards.items()},
            [
                record
                | {
                    field: record[field][places[record["id"]]]
                    for field in ("answers", *SCORE_FIELDS)
                    if field in record
                }
                for record in self.records
            ],
        )

    def part(self, which: slice) -> "ScoredAnswers":
        """The answers at these places, of every prompt."""
        return self.pick({name: which for name in self.rewards})

    def given(self) -> dict[str, list[GivenAnswer]]:
        """The answers as the tokens that were sampled."""
        return {
            record["id"]: [
                GivenAnswer(
                    np.asarray(record["prompt_token_ids"] + answer["token_ids"], np.int32),
                    len(record["prompt_token_ids"]),
                )
                for answer in record["answers"]
            ]
            for record in self.records
        }


def sampling_of(cfg: EvaluationConfig) -> SamplingConfig:
    """How each model's answers are drawn."""
    assert cfg.temperature is not None
    return SamplingConfig(max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature)


def answer_prompts(
    name: str, model: str, cfg: EvaluationConfig, folder: pathlib.Path, *, num_samples: int
) -> ScoredAnswers:
    """A model's answers with their scores; a killed run goes on with those it has.

    Args:
        name: of the files in `folder`.
        model: its folder.
        cfg: the prompts, and how they are answered.
        folder: where answers and scores are kept.
        num_samples: answers to each prompt.

    Raises:
        ValueError: prompts or a model that cannot be, or answers made with other settings.
        OSError: a file cannot be read or written.
    """
    bulk = BulkConfig(
        model=model,
        prompts=cfg.prompts,
        output=str(folder / f"answers_{name}.jsonl"),
        template=cfg.template,
        default_system=cfg.default_system,
        num_samples=num_samples,
        sampling=sampling_of(cfg),
        seed=cfg.seed,
        chunk_size=cfg.chunk_size,
        slots=cfg.slots,
        drop_oldest_turns=True,
        max_left_out_share=cfg.max_left_out_share,
        mesh=cfg.mesh,
    )
    run_bulk(
        bulk,
        lambda done: print(f"  {name}: {done}", file=sys.stderr, flush=True),
        lambda line: print(f"evaluation: {name}: {line}", flush=True),
    )
    return score_answers_file(name, bulk.output, cfg, folder)


def answer_as_referenced(
    cfg: EvaluationConfig, folder: pathlib.Path, *, ids: Collection[str]
) -> ScoredAnswers | None:
    """The answers that stand in the data, scored like a model's; None where there are none.

    Args:
        cfg: the prompts.
        folder: where answers and scores are kept.
        ids: of the prompts that the models answered.
    """
    rows = [
        prompt.to_json() | {"answers": [{"text": prompt.reference}]}
        for prompt in read_prompts(cfg.prompts)
        if prompt.reference and prompt.id in ids
    ]
    if not rows:
        return None
    path = folder / f"answers_{REFERENCE}.jsonl"
    multi_host.by_first("reference answers", lambda: write_rows(path, rows))
    return score_answers_file(REFERENCE, str(path), cfg, folder)


def score_answers_file(
    name: str, path: str, cfg: EvaluationConfig, folder: pathlib.Path
) -> ScoredAnswers:
    """The answers of a file with their scores, which are written to `scored_{name}.jsonl`.

    Raises:
        ValueError: a file or reward model that cannot be.
        OSError: the scores cannot be written.
    """
    output = folder / f"scored_{name}.jsonl"
    score_file(
        ScoreConfig(
            model=cfg.reward,
            input=path,
            output=str(output),
            template=cfg.template,
            default_system=cfg.default_system,
            # Answers that do not fit have been paid for, and are counted as unscored.
            max_left_out_share=1.0,
            rows_at_once=cfg.rows_at_once,
            rule=cfg.score or AnswerScoreConfig(),
        ),
        lambda line: tell(f"  {name}: {line}"),
    )
    records = read_rows(output, unfinished="read")
    rewards: Values = {record["id"]: list(record["rewards"]) for record in records}
    return ScoredAnswers(read_answered(output), rewards, records)
