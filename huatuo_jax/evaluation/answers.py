"""The answers of an evaluation: sampled from each model, and scored by the reward model.

Best-of-n sampling counts as a model of its own: the reward model's best of n SFT answers. The n
answers are sampled in addition to those that represent SFT, so that no answer is compared with
itself and none of SFT's is known to be worse: compared with the n - 1 answers that were not chosen,
the best one would always have the higher reward, while over a fresh answer it has it with
probability n / (n + 1).
"""

import dataclasses
import math
import pathlib
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from huatuo_jax.core import distributed
from huatuo_jax.core.config import operational
from huatuo_jax.core.files import read_rows, write_rows
from huatuo_jax.core.progress import tell
from huatuo_jax.core.sharding import MeshConfig
from huatuo_jax.core.statistics import Values
from huatuo_jax.data.accounting import check_share
from huatuo_jax.data.readers import read_prompts
from huatuo_jax.generation.bulk import BulkConfig, run_bulk
from huatuo_jax.generation.requests import SamplingConfig
from huatuo_jax.judge.offline import OfflineName
from huatuo_jax.judge.questions import Answered, read_answered
from huatuo_jax.ppo.rewards import AnswerScoreConfig
from huatuo_jax.reward.score_file import ScoreConfig, score_file
from huatuo_jax.training.scoring import GivenAnswer

REFERENCE = "reference"
"""The name, in place of a model's, of the answers in the data."""

SCORE_FIELDS = ("scores", "normalized_scores", "rewards")
"""The fields of a record of scored answers with a value for each answer."""

BEST_OF_N = "best_of_n"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """The models, the prompts and the sampling of an evaluation.

    Attributes:
        base: model folder before fine-tuning; None for the run's initial model.
        sft: model folder after fine-tuning, the reference of the KL divergence.
        ppo: model folder after PPO.
        reward: reward model's folder.
        prompts: file of prompts that no stage was trained on, with references where available.
        max_left_out_share: largest share of the prompts left out as too long for the models.
        template: chat template by name.
        default_system: its system text; None for that of the run's fine-tuning, or the template's.
        num_samples: answers of each model to each prompt.
        best_of_n: answers of the SFT model of which the reward model takes the best; they are
            sampled in addition to the `num_samples` of SFT. None for `num_samples`, at least 2.
        max_new_tokens: tokens of an answer at most.
        temperature: sampling temperature, above 0; None for that of PPO's rollouts, at which reward
            and KL are those that PPO optimised.
        seed: of the answers and of the bootstrap.
        judge: the offline judge of the answers; None for that of the run's labels, else the rubric.
        score: how a score becomes a reward, above all that of a truncated answer; None for the rule
            of the run's PPO, or `AnswerScoreConfig()` without one.
        rows_at_once: rows of a batch, where answers are scored.
        chunk_size: prompts whose answers are written together.
        slots: answers decoded at once; None for up to 64.
        mesh: device mesh for the answers; losses and scores are computed on another.
    """

    base: str | None = operational(None)
    sft: str = operational("{workdir}/sft/model")
    ppo: str = operational("{workdir}/ppo/model")
    reward: str = operational("{workdir}/reward/model")
    prompts: str = operational("{workdir}/held_out_prompts.jsonl")
    max_left_out_share: float = operational(0.1)
    template: str = "huatuogpt"
    default_system: str | None = None
    num_samples: int = 4
    best_of_n: int | None = None
    max_new_tokens: int = 512
    temperature: float | None = None
    seed: int = 0
    judge: OfflineName | None = None
    score: AnswerScoreConfig | None = None
    rows_at_once: int = operational(8)
    chunk_size: int = operational(256)
    slots: int | None = operational(None)
    mesh: MeshConfig = operational(MeshConfig())

    def __post_init__(self) -> None:
        """Validates the fields."""
        for name in ("num_samples", "max_new_tokens", "rows_at_once", "chunk_size", "slots"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value!r} must be at least 1")
        if self.best_of_n is not None and self.best_of_n < 2:
            raise ValueError(
                f"best_of_n={self.best_of_n!r} must be at least 2, or None for num_samples: the "
                "best of one answer is SFT's own"
            )
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature!r} must be above 0")
        check_share(self.max_left_out_share, name="max_left_out_share")

    @property
    def num_candidates(self) -> int:
        """Returns the n of best-of-n."""
        return max(2, self.num_samples) if self.best_of_n is None else self.best_of_n


class ScoredAnswers(NamedTuple):
    """One model's answers in the order of the prompts.

    Attributes:
        answered: prompts and texts.
        rewards: the reward model's scores as PPO counts them, see `score_file`.
        records: of the file, each with `answers` and `prompt_token_ids`.
    """

    answered: list[Answered]
    rewards: Values
    records: list[dict[str, Any]]

    @property
    def texts(self) -> list[str]:
        """Returns all texts."""
        return [text for one in self.answered for text in one.answers]

    @property
    def characters(self) -> Values:
        """Returns the length of each text."""
        return {one.prompt.id: [float(len(t)) for t in one.answers] for one in self.answered}

    def field(self, name: str, matching: str) -> Values:
        """Returns 1 for each answer whose field has this value, 0 for the others."""
        return {
            record["id"]: [float(answer[name] == matching) for answer in record["answers"]]
            for record in self.records
        }

    def only(self, ids: Collection[str]) -> "ScoredAnswers":
        """Selects the answers to some of the prompts."""
        return ScoredAnswers(
            [one for one in self.answered if one.prompt.id in ids],
            {name: found for name, found in self.rewards.items() if name in ids},
            [record for record in self.records if record["id"] in ids],
        )

    def pick(self, places: Mapping[str, slice]) -> "ScoredAnswers":
        """Selects some of the answers to each prompt, in the records too."""
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
        """Selects the answers at these indices, of every prompt."""
        return self.pick({name: which for name in self.rewards})

    def given(self) -> dict[str, list[GivenAnswer]]:
        """Returns the answers as the sampled tokens."""
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
    """Returns the sampling of each model's answers."""
    assert cfg.temperature is not None
    return SamplingConfig(max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature)


def answer_prompts(
    name: str, model: str, cfg: EvaluationConfig, folder: pathlib.Path, *, num_samples: int
) -> ScoredAnswers:
    """Generates and scores a model's answers; a killed run resumes with those it has.

    Args:
        name: of the files in `folder`.
        model: its folder.
        cfg: the prompts and the sampling.
        folder: for answers and scores.
        num_samples: answers to each prompt.

    Raises:
        ValueError: invalid prompts or model, or answers made with other settings.
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
    """Scores the answers in the data like a model's; None where there are none.

    Args:
        cfg: the prompts.
        folder: for answers and scores.
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
    distributed.by_first("reference answers", lambda: write_rows(path, rows))
    return score_answers_file(REFERENCE, str(path), cfg, folder)


def score_answers_file(
    name: str, path: str, cfg: EvaluationConfig, folder: pathlib.Path
) -> ScoredAnswers:
    """Scores the answers of a file, and writes the scores to `scored_{name}.jsonl`.

    Raises:
        ValueError: an invalid file or reward model.
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
            # Answers that do not fit were generated all the same, and count as unscored.
            max_left_out_share=1.0,
            rows_at_once=cfg.rows_at_once,
            rule=cfg.score or AnswerScoreConfig(),
        ),
        lambda line: tell(f"  {name}: {line}"),
    )
    records = read_rows(output, unfinished="read")
    rewards: Values = {record["id"]: list(record["rewards"]) for record in records}
    return ScoredAnswers(read_answered(output), rewards, records)


def best_answers(drawn: ScoredAnswers) -> ScoredAnswers:
    """Selects the answer with the highest reward to each prompt, the first one of equals.

    An answer without a reward, which is too long for the reward model, is selected only where none
    has one.
    """
    best = {name: _best_place(rewards) for name, rewards in drawn.rewards.items()}
    return drawn.pick({name: slice(index, index + 1) for name, index in best.items()})


def repeated(best: ScoredAnswers, *, as_often_as: ScoredAnswers) -> ScoredAnswers:
    """Repeats the one answer to each prompt as often as another model has answers."""
    return best._replace(
        answered=[
            dataclasses.replace(
                one,
                answers=one.answers * len(other.answers),
                sampled=one.sampled * len(other.answers),
            )
            for one, other in zip(best.answered, as_often_as.answered, strict=True)
        ]
    )


def kl_upper_bound(n: int) -> float:
    """Returns log n - (n - 1) / n nats, an upper bound of best-of-n's KL divergence per answer.

    Stiennon et al. 2020 (arXiv 2009.01325) give it as the KL divergence from the model; Beirami et
    al. 2024 (arXiv 2401.01879) show that it is an upper bound, reached where no answer is sampled
    twice.
    """
    return math.log(n) - (n - 1) / n


def _best_place(rewards: Sequence[float | None]) -> int:
    ranks = [-math.inf if reward is None else reward for reward in rewards]
    return ranks.index(max(ranks))
