"""The whole recipe on real data, beside a policy that is rewarded for length alone.

Fine-tuning from scratch on some 13,000 dialogues of the four kinds (groups 1 to 3), a Llama of 8
million parameters; answers to real patients' prompts; the offline judge's scores of them as
comparisons, with GPT-4's of DISC-MedLLM's consultations mixed in; a reward model; PPO. The control
is the same PPO with each answer's length for its score. All three policies answer the same held-out
prompts, and the reward model scores every answer.

    HUATUO_SHARED_DATA=DIR python benchmarks/rlaif_real_data.py --workdir=runs/rlaif_real

Stopped, it goes on with the same command. `report.html` in the folder of the run shows answers and
curves; what is written to `--output` are figures alone.
"""

import dataclasses
import itertools
import json
import pathlib
import shutil
import time
from typing import Any

import real_data
from absl import app, flags

from huatuo_jax.data.mixture import HeldOutConfig
from huatuo_jax.evaluation.answers import EvaluationConfig
from huatuo_jax.evaluation.stage import run_evaluation, write_json
from huatuo_jax.generation.requests import SamplingConfig
from huatuo_jax.ppo.config import PpoConfig, PpoLoopConfig, RolloutConfig, ScoreConfig, ValueConfig
from huatuo_jax.ppo.prompts import PromptsConfig as PpoPrompts
from huatuo_jax.ppo.stage import run_ppo
from huatuo_jax.preferences.data import ComparisonsConfig, ComparisonSource
from huatuo_jax.preferences.from_judgements import ComparisonConfig, MixedFile
from huatuo_jax.recipe.config import (
    AnswersConfig,
    LabelsConfig,
    PromptsConfig,
    ReportConfig,
    RlaifConfig,
)
from huatuo_jax.recipe.recipe import run_rlaif
from huatuo_jax.report.run import Run, read_run
from huatuo_jax.reward.config import RewardConfig
from huatuo_jax.training.initial_model import ModelConfig
from huatuo_jax.training.loop import LoopConfig
from huatuo_jax.training.metrics import read_rows
from huatuo_jax.training.optimizer import OptimizerConfig

_WORKDIR = flags.DEFINE_string("workdir", "runs/rlaif_real", "The run's folder.")
_SFT_STEPS = flags.DEFINE_integer("sft_steps", 800, "Steps of fine-tuning.", lower_bound=1)
_PROMPTS = flags.DEFINE_integer("prompts", 300, "Prompts to learn from.", lower_bound=1)
_HELD_OUT = flags.DEFINE_integer("held_out_prompts", 80, "To evaluate on.", lower_bound=1)
_DISC_PAIRS = flags.DEFINE_integer("disc_pairs", None, "GPT-4's pairs at most, to try it out.")
_ITERATIONS = flags.DEFINE_integer("iterations", 30, "Of PPO.", lower_bound=1)
_OUTPUT = flags.DEFINE_string(
    "output", "benchmarks/results/rlaif_real_data.json", "File for the figures."
)

ANSWER_TOKENS = 96
HELD_OUT = HeldOutConfig(share=0.1)
CONTROL = "length_only"
TOLD_OF_PPO = ("score", "kl_per_sequence", "response_length", "entropy", "eos_rate")


def main() -> None:
    """The recipe, the control, and the figures of both."""
    workdir = pathlib.Path(_WORKDIR.value)
    workdir.mkdir(parents=True, exist_ok=True)
    pairs = list(itertools.chain(*real_data.disc_pairs().values()))
    disc = real_data.write_pairs(workdir / "disc_comparisons.jsonl", pairs)
    cfg = recipe(disc)
    run_rlaif(cfg, workdir)
    began = time.monotonic()
    evaluation, rows = control(cfg.in_workdir(workdir), workdir / CONTROL)
    figures = {
        "settings": {
            "sft_steps": _SFT_STEPS.value,
            "prompts": _PROMPTS.value,
            "held_out_prompts": _HELD_OUT.value,
            "answers_of_a_prompt": cfg.answers.num_samples,
            "answer_tokens_at_most": ANSWER_TOKENS,
            "iterations": _ITERATIONS.value,
            "answers_of_an_iteration": cfg.ppo.rollout.num_prompts,
            "kl_coef": cfg.ppo.kl_coef,
        },
        **of_stages(read_run(workdir)),
        CONTROL: {"ppo": of_ppo(rows), "evaluation": of_evaluation(evaluation)},
        "control_minutes_of_this_call": round((time.monotonic() - began) / 60, 1),
    }
    write_json(pathlib.Path(_OUTPUT.value), figures)
    print(json.dumps(figures, indent=2, ensure_ascii=False))


def recipe(disc: str) -> RlaifConfig:
    """All stages, made for two cores and somewhat more than an hour."""
    sft = real_data.sft_settings(steps=_SFT_STEPS.value, batch_size=2)
    return RlaifConfig(
        sft=dataclasses.replace(
            sft, loop=LoopConfig(evaluate_every=400, checkpoint_every=100, log_every=10)
        ),
        prompts=PromptsConfig(limit=_PROMPTS.value, held_out_limit=_HELD_OUT.value),
        answers=AnswersConfig(
            num_samples=4, sampling=SamplingConfig(max_new_tokens=ANSWER_TOKENS), chunk_size=100
        ),
        labels=LabelsConfig(
            comparison=ComparisonConfig(mix=(MixedFile(path=disc, limit=_DISC_PAIRS.value),))
        ),
        reward=RewardConfig(
            model=ModelConfig(directory="{workdir}/sft/model"),
            data=ComparisonsConfig(
                sources=(ComparisonSource(paths=("{workdir}/comparisons.jsonl",)),),
                template=real_data.TEMPLATE,
                max_length=512,
                row_length=3072,
                held_out=HELD_OUT,
            ),
            optimizer=OptimizerConfig(learning_rate=2e-4, warmup_share=0.1),
            num_epochs=1,
            batch_size=4,
            normalization_answers="{workdir}/answers.jsonl",
            loop=LoopConfig(evaluate_every=1000, checkpoint_every=25, log_every=5),
        ),
        ppo=_ppo(),
        evaluation=EvaluationConfig(
            template=real_data.TEMPLATE, num_samples=2, max_new_tokens=ANSWER_TOKENS
        ),
        report=ReportConfig(title="The recipe on real data"),
    )


def _ppo() -> PpoConfig:
    return PpoConfig(
        model=ModelConfig(directory="{workdir}/sft/model"),
        data=PpoPrompts(
            paths=("{workdir}/prompts.jsonl",),
            template=real_data.TEMPLATE,
            max_prompt_tokens=160,
            max_left_out_share=1.0,
        ),
        optimizer=real_data.ppo_optimizer(1e-4),
        value=ValueConfig(
            optimizer=real_data.ppo_optimizer(5e-4), warmup_iterations=min(2, _ITERATIONS.value - 1)
        ),
        rollout=RolloutConfig(num_prompts=24, max_new_tokens=ANSWER_TOKENS),
        score=ScoreConfig(clip=5.0),
        kl_coef=0.03,
        target_kl_per_sequence=10.0,
        num_iterations=_ITERATIONS.value,
        num_epochs=1,
        num_minibatches=2,
        loop=PpoLoopConfig(checkpoint_every=10, samples_per_iteration=4),
    )


def control(cfg: RlaifConfig, folder: pathlib.Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """PPO for length alone, its evaluation by the reward model, and its metrics."""
    score = dataclasses.replace(cfg.ppo.score, of="length", scale="running")
    run_ppo(dataclasses.replace(cfg.ppo, score=score), folder)
    answers = folder / "evaluation"
    if not answers.exists():
        # The other models' answers are the recipe's own.
        shutil.copytree(
            folder.parent / "evaluation", answers, ignore=shutil.ignore_patterns("*_ppo.*")
        )
    evaluation = run_evaluation(
        dataclasses.replace(cfg.evaluation, ppo=str(folder / "ppo" / "model")),
        answers,
        data=None,
        compute=cfg.sft.compute.compute_config(),
        mesh=cfg.sft.mesh.make(),
        loss_rows=cfg.sft.rows_at_once,
        loss_chunk=cfg.sft.compute.loss_chunk,
    )
    return evaluation, read_rows(folder / "ppo" / "metrics.jsonl")


def of_stages(run: Run) -> dict[str, Any]:
    """What each stage of the recipe came to."""
    assert run.evaluation is not None and run.labels is not None and run.reward is not None
    return {
        "minutes": {name: round(entry["seconds"] / 60, 1) for name, entry in run.journal.items()},
        "sft_held_out_loss": {
            name: losses["eval/loss"] for name, losses in run.evaluation["held_out_loss"].items()
        },
        "answers": run.journal["answers"]["result"],
        "labels": run.labels,
        "reward_model": run.reward,
        "ppo": of_ppo(run.metrics["ppo"]),
        "evaluation": of_evaluation(run.evaluation),
    }


def of_ppo(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means of the first and the last five iterations that have the number."""
    means = {}
    for name in TOLD_OF_PPO:
        values = [row[f"ppo/{name}"] for row in rows if f"ppo/{name}" in row]
        means[name] = [sum(part) / len(part) for part in (values[:5], values[-5:])]
    return means


def of_evaluation(evaluation: dict[str, Any]) -> dict[str, Any]:
    """All but what each stage gained over an untrained model."""
    left_out = {"held_out_loss", "sampling"}
    kept = {name: value for name, value in evaluation.items() if name not in left_out}
    for name in ("differences", "win_rates"):
        kept[name] = {"ppo_over_sft": kept[name]["ppo_over_sft"]}
    return kept


if __name__ == "__main__":
    app.run(lambda _: main())
