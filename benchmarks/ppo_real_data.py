"""PPO on the models made of real data: curves of 100 iterations, beside a length-only reward.

Two runs from the same fine-tuned policy on the same prompts, real patients' first words: one is
rewarded by the reward model, one by nothing but the length of the answer, the control that shows
what a policy does that only learns to talk longer (or not). Rules for answers that do not end, the
KL penalty and all other settings are the same; scores are divided by a deviation in both (the
reward model's stored one, the running one of lengths).

The defaults are made for models of some 10 million parameters and two cores: 100 iterations of a
run in about 7 minutes.

    HUATUO_SHARED_DATA=DIR python benchmarks/ppo_real_data.py --sft=SFT_DIR --reward=REWARD_DIR

Stopped, it goes on with the same command.
"""

import json
import pathlib
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import real_data
from absl import app, flags

from huatuo_jax.checkpoint import models
from huatuo_jax.ppo.config import PpoConfig, PpoLoopConfig, RolloutConfig, ScoreConfig, ValueConfig
from huatuo_jax.ppo.prompts import PromptsConfig
from huatuo_jax.ppo.stage import run_ppo
from huatuo_jax.training.initial_model import ModelConfig
from huatuo_jax.training.metrics import read_rows

_SFT = flags.DEFINE_string("sft", None, "Directory of the fine-tuned policy, with tokenizer.")
_REWARD = flags.DEFINE_string("reward", None, "Directory of the reward model.")
_PROMPTS = flags.DEFINE_list("prompts", None, "Files of dialogues; None for the real data's.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/ppo_real", "Folder of the two runs.")
_TEMPLATE = flags.DEFINE_string("template", "chatml", "Chat template of both models.")
_ITERATIONS = flags.DEFINE_integer("iterations", 100, "Of each run.", lower_bound=1)
_NUM_PROMPTS = flags.DEFINE_integer("num_prompts", 16, "Answers of an iteration.", lower_bound=2)
_PROMPT_LENGTH = flags.DEFINE_integer("prompt_length", 48, "Tokens of a prompt at most.")
_NEW_TOKENS = flags.DEFINE_integer("new_tokens", 48, "Tokens of an answer at most.", lower_bound=2)
_EPOCHS = flags.DEFINE_integer("epochs", 1, "Passes over each rollout.", lower_bound=1)
_MINIBATCHES = flags.DEFINE_integer("minibatches", 2, "Optimizer steps of a pass.", lower_bound=1)
_LEARNING_RATE = flags.DEFINE_float(
    "learning_rate", 1e-4, "Of the policy; the critic's is 5 times."
)
_KL_COEF = flags.DEFINE_float("kl_coef", 0.05, "Weight of the KL penalty.")
_OUTPUT = flags.DEFINE_string(
    "output", "benchmarks/results/ppo_real_data.json", "File for the curves; a figure beside it."
)
flags.mark_flags_as_required(["sft", "reward"])

REAL_PROMPTS = ("2_sft_multi_real/CMtMedQA_test.json", "2_sft_multi_real/disc_test_examples.jsonl")
SEED = 0
RUNS = ("reward_model", "length_only")
CURVES = {
    "ppo/score": "score, as it comes (length only: right axis)",
    "ppo/reward": "reward of an answer: scaled score, penalty, KL",
    "ppo/kl_per_sequence": "KL of an answer, nats",
    "ppo/response_length": "tokens of an answer",
    "ppo/entropy": "entropy of a token, nats",
    "ppo/explained_variance": "explained variance",
    "ppo/eos_rate": "share of answers that end",
    "ppo/score_length_correlation": "correlation of score and length",
}
PARTS = ("generation", "scoring", "log_probs", "update", "step")


def main() -> None:
    """Run both, or go on with them; write curves and figure."""
    figures: dict[str, Any] = {
        "models": {"policy": _name(_SFT.value), "reward_model": _name(_REWARD.value)},
        "settings": {
            "iterations": _ITERATIONS.value,
            "answers_per_iteration": _NUM_PROMPTS.value,
            "prompt_tokens_at_most": _PROMPT_LENGTH.value,
            "answer_tokens_at_most": _NEW_TOKENS.value,
            "epochs": _EPOCHS.value,
            "minibatches": _MINIBATCHES.value,
            "learning_rate": _LEARNING_RATE.value,
            "kl_coef": _KL_COEF.value,
            "seed": SEED,
        },
    }
    for name in RUNS:
        began = time.monotonic()
        rows = run(name)
        figures[name] = told(rows)
        minutes = (time.monotonic() - began) / 60
        print(f"{name}: {len(rows)} iterations, {minutes:.1f} minutes of this call", flush=True)
    output = pathlib.Path(_OUTPUT.value)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    output.with_suffix(".png").write_bytes(drawn(figures))
    for name in RUNS:
        print(f"{name}: {json.dumps(figures[name]['first_and_last_tenth'], indent=2)}")
    print(f"written to {output} and {output.with_suffix('.png')}")


def run(name: str) -> list[dict[str, Any]]:
    """One run to its end, or found done; the rows of its metrics.

    Raises:
        ValueError: a model or a file that cannot be used.
    """
    workdir = pathlib.Path(_WORKDIR.value) / name
    run_ppo(config(name), workdir)
    rows = read_rows(workdir / "ppo" / "metrics.jsonl")
    return [row for row in rows if "ppo/score" in row]


def config(name: str) -> PpoConfig:
    """The settings of a run; only what scales its scores tells the two apart."""
    files = _PROMPTS.value or [str(real_data.folder() / one) for one in REAL_PROMPTS]
    by_length = name == "length_only"
    return PpoConfig(
        model=ModelConfig(directory=_SFT.value),
        reward_model=_REWARD.value,
        data=PromptsConfig(
            paths=tuple(files),
            reads="first_turns",
            template=_TEMPLATE.value,
            max_prompt_tokens=_PROMPT_LENGTH.value,
            max_left_out_share=1.0,
        ),
        optimizer=real_data.ppo_optimizer(_LEARNING_RATE.value),
        value=ValueConfig(
            optimizer=real_data.ppo_optimizer(5 * _LEARNING_RATE.value),
            warmup_iterations=min(3, _ITERATIONS.value - 1),
        ),
        rollout=RolloutConfig(num_prompts=_NUM_PROMPTS.value, max_new_tokens=_NEW_TOKENS.value),
        score=ScoreConfig(
            of="length" if by_length else "reward_model",
            scale="running" if by_length else "stored",
            clip=5.0,
        ),
        kl_coef=_KL_COEF.value,
        num_iterations=_ITERATIONS.value,
        num_epochs=_EPOCHS.value,
        num_minibatches=_MINIBATCHES.value,
        seed=SEED,
        loop=PpoLoopConfig(checkpoint_every=10, samples_per_iteration=4, tensorboard=False),
    )


def told(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The curves of a run, means of its first and last tenth, and its time."""
    tenth = max(len(rows) // 10, 1)
    curves = {name: [_rounded(row.get(name)) for row in rows] for name in CURVES}
    return {
        "curves": curves,
        "first_and_last_tenth": {
            name: [_mean(values[:tenth]), _mean(values[-tenth:])] for name, values in curves.items()
        },
        "median_seconds": {
            part: _rounded(statistics.median(row[f"throughput/{part}_s"] for row in rows))
            for part in PARTS
        },
        "share_in_generation": _rounded(
            statistics.median(row["throughput/generation_share"] for row in rows)
        ),
        "iterations_stopped_early": sum(row["ppo/stopped_early"] for row in rows),
        "first_minibatch_ratio": sorted(
            {row["ppo/first_minibatch/ratio"] for row in rows if "ppo/first_minibatch/ratio" in row}
        ),
    }


def drawn(figures: dict[str, Any]) -> bytes:
    """The curves of both runs, one panel a quantity, as PNG."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 10), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(4, 2, sharex=True).flatten()
    for panel, (name, title) in zip(panels, CURVES.items(), strict=False):
        for number, one in enumerate(RUNS):
            # A length is no score of the reward model.
            axes = panel.twinx() if number and name == "ppo/score" else panel
            values = figures[one]["curves"][name]
            known = [np.nan if value is None else value for value in values]
            label, places = one.replace("_", " "), range(1, len(known) + 1)
            axes.plot(places, known, label=label, color=f"C{number}", linewidth=1)
        panel.set_title(title, fontsize=9)
        panel.grid(alpha=0.3)
    for panel in panels[len(CURVES) :]:
        panel.set_visible(False)
    panels[1].legend(fontsize=8)
    figure.supxlabel("iteration", fontsize=9)
    found = io.BytesIO()
    figure.savefig(found, format="png", dpi=90)
    return found.getvalue()


def _name(directory: str) -> str:
    """What a model is, without the place of this machine where it lies."""
    info = models.find_model(directory)
    return f"{info.cfg.family}, width {info.cfg.hidden_size}, {info.cfg.num_layers} layers"


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _rounded(statistics.mean(known)) if known else None


if __name__ == "__main__":
    app.run(lambda _: main())
