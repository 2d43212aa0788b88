"""The evaluation of a run: its models on held-out prompts and dialogues, as one JSON file."""

import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from huatuo_jax import multi_host
from huatuo_jax.atomic import write_file
from huatuo_jax.backbone.config import ComputeConfig
from huatuo_jax.checkpoint import models
from huatuo_jax.evaluation import statistics
from huatuo_jax.evaluation.answers import (
    REFERENCE,
    ScoredAnswers,
    answer_as_referenced,
    answer_prompts,
)
from huatuo_jax.evaluation.best_of_n import BEST_OF_N, best_answers, kl_upper_bound, repeated
from huatuo_jax.evaluation.config import EvaluationConfig
from huatuo_jax.evaluation.judging import judge_pairs, score_answers, truth_values
from huatuo_jax.evaluation.likelihood import held_out_loss, sequence_kl
from huatuo_jax.evaluation.release import COMPARED, release
from huatuo_jax.feedback.intervals import Interval, Values, mean_over_prompts
from huatuo_jax.feedback.offline_judge import OfflineJudge
from huatuo_jax.feedback.truth_judge import TruthJudge, open_offline
from huatuo_jax.feedback.win_rates import win_rates
from huatuo_jax.json_lines import write_rows
from huatuo_jax.training.dialogue_data import DialogueData

MODELS = ("base", "sft", "ppo")


def run_evaluation(
    cfg: EvaluationConfig,
    folder: pathlib.Path,
    *,
    data: DialogueData | None,
    compute: ComputeConfig,
    mesh: Mesh,
    loss_rows: int,
    loss_chunk: int,
    rollout_temperature: float,
) -> dict[str, Any]:
    """Evaluates a run's models; killed and run again, it goes on with the answers it has.

    Args:
        cfg: which models and prompts; `cfg.base` is a folder, `cfg.temperature` a number.
        folder: where answers and scores are kept.
        data: the dialogues of fine-tuning, for the held-out loss; None to leave it out.
        compute: how losses and log-probabilities are computed.
        mesh: where.
        loss_rows: rows of a batch of dialogues.
        loss_chunk: positions of each row whose logits are held at once.
        rollout_temperature: that PPO sampled at; told beside the evaluation's own.

    Returns:
        All figures, JSON values; figures over prompts with their 95 % interval.

    Raises:
        ValueError: a model or prompts that cannot be.
        OSError: a file cannot be read or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    assert cfg.base is not None and cfg.temperature is not None
    places = {"base": cfg.base, "sft": cfg.sft, "ppo": cfg.ppo}
    candidates = cfg.num_candidates
    answers = {
        name: answer_prompts(
            name,
            places[name],
            cfg,
            folder,
            # The first ones stand for SFT, the others are those that the best one is chosen from.
            num_samples=cfg.num_samples + (candidates if name == "sft" else 0),
        )
        for name in MODELS
    }
    # Models of fewer positions leave out more prompts: all are compared on the same ones.
    ids = set.intersection(*(set(found.rewards) for found in answers.values()))
    answers = {name: found.only(ids) for name, found in answers.items()}
    answers[BEST_OF_N] = best_answers(answers["sft"].part(slice(cfg.num_samples, None)))
    answers["sft"] = answers["sft"].part(slice(cfg.num_samples))
    multi_host.by_first(
        "best of n",
        lambda: write_rows(folder / f"scored_{BEST_OF_N}.jsonl", answers[BEST_OF_N].records),
    )
    referenced = answer_as_referenced(cfg, folder, ids=ids)
    infos = {name: models.find_model(place) for name, place in places.items()}
    losses = {}
    if data is not None and data.held_out is not None:
        for name in MODELS:
            losses[name] = held_out_loss(
                infos[name],
                data,
                compute=compute,
                mesh=mesh,
                rows_at_once=loss_rows,
                chunk=loss_chunk,
            )
    ratios, num_tokens = sequence_kl(
        infos["ppo"],
        infos["sft"],
        answers["ppo"].given(),
        compute=compute,
        mesh=mesh,
        rows_at_once=cfg.rows_at_once,
        temperature=cfg.temperature,
    )
    everyone = answers if referenced is None else answers | {REFERENCE: referenced}
    judge = open_offline(cfg.judge or "rubric")
    figures = compare(everyone, judge=judge, seed=cfg.seed)
    return figures | {
        "release": release(figures, best_of_n=candidates),
        "held_out_loss": losses,
        "kl": _kl(ratios, num_tokens, seed=cfg.seed)
        | {"best_of_n_upper_bound": kl_upper_bound(candidates)},
        "sampling": {
            "num_samples": cfg.num_samples,
            "best_of_n": candidates,
            "max_new_tokens": cfg.max_new_tokens,
            "temperature": cfg.temperature,
            "rollout_temperature": rollout_temperature,
            "seed": cfg.seed,
        },
    }


def compare(
    answers: Mapping[str, ScoredAnswers], *, judge: OfflineJudge | TruthJudge, seed: int
) -> dict[str, Any]:
    """The figures that follow from answers and scores alone.

    Args:
        answers: of `MODELS` and of `BEST_OF_N`, one a prompt, and of `REFERENCE` where there is
            one, to the same prompts.
        judge: of the answers; the clinic's also tells what is true of them (`truth_...`).
        seed: of the bootstrap.

    Raises:
        ValueError: prompts that the judge cannot judge.
    """
    verdicts = {name: score_answers(found.answered, judge) for name, found in answers.items()}
    figures: dict[str, dict[str, Values]] = {
        name: {"reward": found.rewards, "characters": found.characters}
        | {f"judge_{criterion}": values for criterion, values in verdicts[name].items()}
        for name, found in answers.items()
    }
    if isinstance(judge, TruthJudge):
        for name, found in answers.items():
            figures[name] |= truth_values(found.answered, judge)
    for name in (*MODELS, BEST_OF_N):
        figures[name]["stopped"] = answers[name].field("finish_reason", "stop")
    shown = {**answers, BEST_OF_N: repeated(answers[BEST_OF_N], as_often_as=answers["sft"])}
    return {
        "num_prompts": len(answers[MODELS[0]].answered),
        "judge": judge.name,
        "bootstrap": statistics.bootstrap_settings(seed),
        "models": {
            name: {
                field: _json(mean_over_prompts(values, seed=seed))
                for field, values in found.items()
            }
            | {
                f"distinct_{ngram}": statistics.distinct(answers[name].texts, ngram)
                for ngram in statistics.NGRAMS
            }
            | {"unscored": _num_unscored(answers[name].rewards)}
            for name, found in figures.items()
        },
        "differences": {
            f"{one}_over_{other}": {
                field: _json(
                    statistics.mean_difference(
                        figures[one][field], figures[other][field], seed=seed
                    )
                )
                for field in figures[one]
            }
            for one, other in COMPARED
        },
        "win_rates": {
            f"{one}_over_{other}": win_rates(
                judge_pairs(shown[one].answered, shown[other].answered, judge), seed=seed
            )
            for one, other in COMPARED
        },
        "length": _length(answers, seed=seed),
    }


def write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    """Writes JSON that is never seen half written."""
    text = json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False)
    write_file(path, f"{text}\n")


def _length(answers: Mapping[str, ScoredAnswers], *, seed: int) -> dict[str, Any]:
    """How much of PPO's gain in reward its answers' length accounts for.

    The slope is that of reward on characters among the SFT model's answers to one prompt; what is
    left of the gain after slope times the difference in length is the gain at equal length.
    """
    slope = statistics.slope_within_prompts(answers["sft"].rewards, answers["sft"].characters)

    def by_length(name: str) -> Values:
        lengths = answers[name].characters
        return {prompt: _scaled(found, slope) for prompt, found in lengths.items()}

    def without_length(name: str) -> Values:
        parts = by_length(name)
        rewards = answers[name].rewards
        return {prompt: _less(found, parts[prompt]) for prompt, found in rewards.items()}

    return {
        "reward_per_character": slope,
        "gain_by_length": _json(
            statistics.mean_difference(by_length("ppo"), by_length("sft"), seed=seed)
        ),
        "gain_at_equal_length": _json(
            statistics.mean_difference(without_length("ppo"), without_length("sft"), seed=seed)
        ),
    }


def _scaled(values: Sequence[float | None], factor: float) -> list[float | None]:
    return [None if value is None else factor * value for value in values]


def _less(values: Sequence[float | None], others: Sequence[float | None]) -> list[float | None]:
    return [
        None if value is None or other is None else value - other
        for value, other in zip(values, others, strict=True)
    ]


def _kl(ratios: Values, num_tokens: int, *, seed: int) -> dict[str, Any]:
    per_sequence = mean_over_prompts(ratios, seed=seed)
    total = sum(one for one in itertools.chain(*ratios.values()) if one is not None)
    return {
        "per_sequence": _json(per_sequence),
        "per_token": total / num_tokens if num_tokens else None,
        "num_answers": sum(map(len, ratios.values())),
    }


def _num_unscored(values: Values) -> int:
    return sum(one is None for found in values.values() for one in found)


def _json(interval: Interval | None) -> dict[str, float | int] | None:
    return None if interval is None else interval.to_json()
