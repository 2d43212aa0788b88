"""The evaluation of a run: figures of its models on held-out prompts and dialogues."""

import asyncio
import itertools
import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from huatuo_jax.backbone.config import ComputeConfig
from huatuo_jax.backbone.transformer import Transformer
from huatuo_jax.checkpoint import models
from huatuo_jax.core import distributed, statistics
from huatuo_jax.core.files import make_folder, write_file, write_rows
from huatuo_jax.core.statistics import Interval, Values, mean_over_prompts
from huatuo_jax.evaluation.answers import (
    BEST_OF_N,
    REFERENCE,
    EvaluationConfig,
    ScoredAnswers,
    answer_as_referenced,
    answer_prompts,
    best_answers,
    kl_upper_bound,
    repeated,
)
from huatuo_jax.evaluation.release import COMPARED, release
from huatuo_jax.judge.judgements import CRITERIA, Judge, JudgementFailed
from huatuo_jax.judge.offline import TRUTHS, OfflineJudge, TruthJudge, open_offline
from huatuo_jax.judge.questions import Answered, Verdict, points_of, win_rates
from huatuo_jax.sft import evaluation_numbers, token_loss
from huatuo_jax.training.dialogue_data import DialogueData
from huatuo_jax.training.loop import make_measure
from huatuo_jax.training.scoring import GivenAnswer, Scorer

MODELS = ("base", "sft", "ppo")


def judge_pairs(
    answered: Sequence[Answered], others: Sequence[Answered], judge: Judge
) -> dict[str, list[Verdict | None]]:
    """Judges two models' answers to the same prompts in both orders, by prompt.

    Args:
        answered: one model's answers.
        others: the other's, to the same prompts in the same order, as many to each.
        judge: asked twice about each pair, in both orders.

    Returns:
        The verdicts on the answers of the same index; None where the judge gave none.
    """

    async def run() -> dict[str, list[Verdict | None]]:
        found: dict[str, list[Verdict | None]] = {}
        for one, other in zip(answered, others, strict=True):
            assert one.prompt.id == other.prompt.id
            found[one.prompt.id] = [
                await _verdict(judge, one, text, against)
                for text, against in zip(one.answers, other.answers, strict=True)
            ]
        return found

    return asyncio.run(run())


def score_answers(
    answered: Sequence[Answered], judge: Judge
) -> dict[str, dict[str, list[float | None]]]:
    """Returns the judge's scores by criterion, then by prompt."""

    async def run() -> dict[str, dict[str, list[float | None]]]:
        found: dict[str, dict[str, list[float | None]]] = {name: {} for name in CRITERIA}
        for one in answered:
            replies = [await judge.score(one.prompt, text) for text in one.answers]
            for name in CRITERIA:
                found[name][one.prompt.id] = [
                    None if reply.scores is None else reply.scores[name] for reply in replies
                ]
        return found

    return asyncio.run(run())


def truth_values(
    answered: Sequence[Answered], judge: TruthJudge
) -> dict[str, dict[str, list[float | None]]]:
    """Returns the facts about each answer, as `truth_{name}` by `TRUTHS`, then by prompt."""
    found: dict[str, dict[str, list[float | None]]] = {f"truth_{name}": {} for name in TRUTHS}
    for one in answered:
        truths = [judge.truths(one.prompt, text) for text in one.answers]
        for name in TRUTHS:
            found[f"truth_{name}"][one.prompt.id] = [values[name] for values in truths]
    return found


def held_out_loss(
    info: models.ModelInfo,
    data: DialogueData,
    *,
    compute: ComputeConfig,
    mesh: Mesh,
    rows_at_once: int,
    chunk: int,
) -> dict[str, float]:
    """Computes loss, perplexity and token accuracy on the held-out dialogues, as SFT does.

    Args:
        info: the model.
        data: with held-out rows.
        compute: dtypes and kernels.
        mesh: devices.
        rows_at_once: rows of a batch.
        chunk: positions of each row whose logits are held at once.
    """
    module = Transformer(info.cfg, compute)
    variables = {"params": models.load_params(info, mesh=mesh)}
    measure = make_measure(
        lambda variables, batch: token_loss(module, variables, batch, chunk=chunk).others,
        lambda: data.evaluation_batches(rows_at_once, mesh),
        evaluation_numbers,
        mesh,
    )
    return measure(variables)


def sequence_kl(
    policy: models.ModelInfo,
    reference: models.ModelInfo,
    answers: Mapping[str, Sequence[GivenAnswer]],
    *,
    compute: ComputeConfig,
    mesh: Mesh,
    rows_at_once: int,
    temperature: float,
) -> tuple[Values, int]:
    """Returns the log-ratio of policy to reference of each of the policy's answers, by prompt.

    Its mean estimates the KL divergence per answer without bias; a single one may be negative.

    Args:
        policy: the model that gave the answers.
        reference: the model it is compared with.
        answers: as sampled, by prompt.
        compute: dtypes and kernels of both.
        mesh: devices.
        rows_at_once: rows of a batch.
        temperature: sampling temperature of the answers.

    Returns:
        The log-ratios, and the number of tokens of all answers.
    """
    flat = [one for found in answers.values() for one in found]

    def log_probs(info: models.ModelInfo) -> list[np.ndarray]:
        scorer = Scorer(
            Transformer(info.cfg, compute),
            {"params": models.load_params(info, mesh=mesh)},
            mesh=mesh,
            rows_at_once=rows_at_once,
        )
        return scorer.log_probs(flat, temperature=temperature)

    ratios = iter(_ratios(log_probs, policy, reference))
    num_tokens = sum(len(one.token_ids) - one.prompt_length for one in flat)
    return {name: [next(ratios) for _ in found] for name, found in answers.items()}, num_tokens


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
    """Evaluates a run's models; killed and run again, it resumes with the answers it has.

    Args:
        cfg: which models and prompts; `cfg.base` is a folder, `cfg.temperature` a number.
        folder: for answers and scores.
        data: the dialogues of fine-tuning, for the held-out loss; None to leave it out.
        compute: dtypes and kernels of losses and log-probabilities.
        mesh: devices.
        loss_rows: rows of a batch of dialogues.
        loss_chunk: positions of each row whose logits are held at once.
        rollout_temperature: PPO's sampling temperature, reported beside the evaluation's own.

    Returns:
        All figures, JSON values; figures over prompts with their 95 % interval.

    Raises:
        ValueError: an invalid model or prompts.
        OSError: a file cannot be read or written.
    """
    make_folder(folder)
    assert cfg.base is not None and cfg.temperature is not None
    places = {"base": cfg.base, "sft": cfg.sft, "ppo": cfg.ppo}
    candidates = cfg.num_candidates
    answers = {
        name: answer_prompts(
            name,
            places[name],
            cfg,
            folder,
            # The first ones represent SFT; the best one is chosen from the others.
            num_samples=cfg.num_samples + (candidates if name == "sft" else 0),
        )
        for name in MODELS
    }
    # Models of fewer positions leave out more prompts: all are compared on the same ones.
    ids = set.intersection(*(set(found.rewards) for found in answers.values()))
    answers = {name: found.only(ids) for name, found in answers.items()}
    answers[BEST_OF_N] = best_answers(answers["sft"].part(slice(cfg.num_samples, None)))
    answers["sft"] = answers["sft"].part(slice(cfg.num_samples))
    distributed.by_first(
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
    """Returns the figures that follow from answers and scores alone.

    Args:
        answers: of `MODELS`, of `BEST_OF_N` (one a prompt), and of `REFERENCE` where there is one,
            to the same prompts.
        judge: of the answers; the clinic's also gives the facts about them (`truth_...`).
        seed: of the bootstrap.

    Raises:
        ValueError: prompts that the judge does not take.
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
    """Writes JSON atomically."""
    text = json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False)
    write_file(path, f"{text}\n")


async def _verdict(judge: Judge, one: Answered, text: str, against: str) -> Verdict | None:
    """Judges both orders; None if the judge failed on either."""
    try:
        return Verdict(
            await _points(judge, one, text, against),
            1.0 - await _points(judge, one, against, text),
        )
    except JudgementFailed:
        return None


async def _points(judge: Judge, one: Answered, first: str, second: str) -> float:
    """Returns 1 if the first text is the better one, 0 if the second, 1/2 for a tie."""
    reply = await judge.compare(one.prompt, first, second)
    assert reply.p_first is not None
    return points_of(reply.p_first)


def _ratios(
    log_probs: Callable[[models.ModelInfo], list[np.ndarray]],
    policy: models.ModelInfo,
    reference: models.ModelInfo,
) -> list[float]:
    return [
        float(np.asarray(one, np.float64).sum() - np.asarray(other, np.float64).sum())
        for one, other in zip(log_probs(policy), log_probs(reference), strict=True)
    ]


def _length(answers: Mapping[str, ScoredAnswers], *, seed: int) -> dict[str, Any]:
    """Estimates how much of PPO's gain in reward its answers' length accounts for.

    The slope is that of reward on characters among the SFT model's answers to one prompt; the gain
    less slope times the difference in length is the gain at equal length.
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
    total = math.fsum(one for one in itertools.chain(*ratios.values()) if one is not None)
    return {
        "per_sequence": _json(per_sequence),
        "per_token": total / num_tokens if num_tokens else None,
        "num_answers": sum(map(len, ratios.values())),
    }


def _num_unscored(values: Values) -> int:
    return sum(one is None for found in values.values() for one in found)


def _json(interval: Interval | None) -> dict[str, float | int] | None:
    return None if interval is None else interval.to_json()
