"""One contender of `benchmarks/ppo.py`, in a process of its own.

    python benchmarks/ppo_contenders.py NAME FOLDER THREADS

FOLDER holds `policy/` and `reward/` (Hugging Face, with tokenizer), `prompts.jsonl`, the same
prompts as token ids in `prompts.json`, and `settings.json`; see `contenders.py`. A contender hands
back, of each timed iteration, its seconds and their parts: `generation`, `scoring` (by the reward
model), `log_probs` (with the reference's and the values) and `update`, which takes what is left.
"""

import functools
import importlib.metadata
import json
import pathlib
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
from contenders import Contender, Marks, Result, Settings, main, trl_settings

PARTS = ("generation", "scoring", "log_probs", "update")


def ours(folder: pathlib.Path, settings: Settings) -> Result:
    """This project's PPO stage as a user runs it; the clock is that of its metrics."""
    from huatuo_jax.ppo.config import (
        PpoConfig,
        PpoLoopConfig,
        RolloutConfig,
        ScoreConfig,
        ValueConfig,
    )
    from huatuo_jax.ppo.prompts import PromptsConfig
    from huatuo_jax.ppo.stage import run_ppo
    from huatuo_jax.training.initial_model import ComputeSection, ModelConfig
    from huatuo_jax.training.metrics import read_rows
    from huatuo_jax.training.optimizer import OptimizerConfig

    cfg = PpoConfig(
        model=ModelConfig(directory=str(folder / "policy")),
        reward_model=str(folder / "reward"),
        data=PromptsConfig(
            paths=(str(folder / "prompts.jsonl"),),
            template=settings["template"],
            max_prompt_tokens=settings["max_prompt_tokens"],
        ),
        optimizer=OptimizerConfig(decay="constant", **settings["optimizer"]),
        value=ValueConfig(start="reward", head="keep"),
        rollout=RolloutConfig(
            num_prompts=settings["num_prompts"],
            max_new_tokens=settings["response_length"],
            temperature=settings["temperature"],
        ),
        score=ScoreConfig(scale="raw", on_truncation="keep", penalty=None),
        kl_coef=settings["kl_coef"],
        num_iterations=settings["num_steps"],
        num_epochs=settings["num_epochs"],
        num_minibatches=1,
        compute=ComputeSection(**settings["ours"]["compute"]),
        loop=PpoLoopConfig(
            checkpoint_every=settings["num_steps"] + 1,
            samples_per_iteration=0,
            tensorboard=False,
        ),
    )
    with tempfile.TemporaryDirectory() as workdir:
        run_ppo(cfg, workdir)
        rows = read_rows(pathlib.Path(workdir) / "ppo" / "metrics.jsonl")
    first, timed = rows[0], rows[settings["num_warmup"] :]
    moments = [row["time_s"] for row in rows[settings["num_warmup"] - 1 :]]
    seconds = np.diff(moments).tolist()
    parts = {
        name: [row[f"throughput/{name}_s"] for row in timed] for name in PARTS if name != "update"
    }
    return {
        **_result(seconds, parts, [int(row["ppo/answer_tokens"]) for row in timed]),
        "first_scores": {
            "mean": first["ppo/score"],
            "standard_deviation": first["ppo/score_deviation"],
        },
        "versions": _versions("jax", "flax"),
    }


def trl(folder: pathlib.Path, settings: Settings, *, checkpointing: bool) -> Result:
    """TRL's PPOTrainer on the same models and prompts, already tokenised.

    All that concerns speed is its default (but for the dtype, the batch, and, where the contender's
    name says so, gradient checkpointing). Its functions are timed from outside.
    """
    import datasets
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        TrainerCallback,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    tokenizer = AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(settings["stop_token_id"])
    # An id of its own: by it TRL tells what is padding.
    tokenizer.add_special_tokens({"pad_token": "<|padding|>"})
    prompts = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    data = datasets.Dataset.from_dict({"input_ids": prompts})

    def policy() -> Any:
        return AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32)

    def scorer() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(
            folder / "reward", dtype=torch.float32, num_labels=1
        )

    clock = _Clock(Marks(settings["num_warmup"]))
    reward_model = scorer()
    first_scores: list[Any] = []
    original = ppo_trainer.get_reward

    def get_reward(model: Any, rows: Any, pad: int, context_length: int) -> Any:
        if model is not reward_model:
            return clock.timed("log_probs", original)(model, rows, pad, context_length)
        clock.answer_tokens += int((rows[:, context_length:] != pad).sum())
        found = clock.timed("scoring", original)(model, rows, pad, context_length)
        if not clock.iterations:
            first_scores.append(found[1])
        return found

    forward = ppo_trainer.forward

    def forward_without_gradient(*arguments: Any) -> Any:
        # Of the rollout's passes; those of the update belong to what is left.
        return (forward if torch.is_grad_enabled() else clock.timed("log_probs", forward))(
            *arguments
        )

    ppo_trainer.get_reward = get_reward
    ppo_trainer.forward = forward_without_gradient
    ppo_trainer.batch_generation = clock.timed("generation", ppo_trainer.batch_generation)

    class Step(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.step_ended()

    trainer = PPOTrainer(
        args=PPOConfig(
            **{
                name: value
                for name, value in trl_settings(folder, settings).items()
                if name != "max_steps"
            },
            per_device_train_batch_size=settings["num_prompts"],
            total_episodes=settings["num_prompts"] * settings["num_steps"],
            num_ppo_epochs=settings["num_epochs"],
            num_mini_batches=1,
            response_length=settings["response_length"],
            temperature=settings["temperature"],
            stop_token="eos",
            kl_coef=settings["kl_coef"],
            num_sample_generations=0,
            gradient_checkpointing=checkpointing,
        ),
        processing_class=tokenizer,
        model=policy(),
        ref_model=policy(),
        reward_model=reward_model,
        value_model=scorer(),
        train_dataset=data,
        eval_dataset=data,
        callbacks=[Step()],
    )
    trainer.train()
    scores_N = torch.cat(first_scores)
    timed = slice(settings["num_warmup"], None)
    parts = {name: clock.parts[name][timed] for name in PARTS if name != "update"}
    return {
        **_result(clock.marks.seconds, parts, clock.tokens[timed]),
        "first_scores": {
            "mean": float(scores_N.mean()),
            "standard_deviation": float(scores_N.std(correction=0)),
        },
        "versions": _versions("trl", "torch", "transformers", "accelerate"),
    }


class _Clock:
    """Seconds of the parts of iterations, counted around functions."""

    def __init__(self, marks: Marks) -> None:
        """Starts with nothing."""
        self.marks = marks
        self.iterations = 0
        self.answer_tokens = 0
        self.tokens: list[int] = []
        self.parts: dict[str, list[float]] = defaultdict(list)
        self._now: dict[str, float] = defaultdict(float)

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its seconds counted."""

        def call(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            found = function(*arguments, **named)
            self._now[part] += time.perf_counter() - began
            return found

        return call

    def step_ended(self) -> None:
        """Ends an iteration."""
        self.marks.step_ended()
        self.iterations += 1
        self.tokens.append(self.answer_tokens)
        for name in PARTS:
            self.parts[name].append(self._now[name])
        self._now.clear()
        self.answer_tokens = 0


def _result(
    seconds: list[float], parts: dict[str, list[float]], answer_tokens: list[int]
) -> Result:
    known = np.sum(list(parts.values()), axis=0)
    return {
        "seconds": seconds,
        "counts": [1] * len(seconds),
        "answer_tokens": answer_tokens,
        "parts": parts | {"update": (np.asarray(seconds) - known).tolist()},
    }


def _versions(*names: str) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in names}


CONTENDERS: dict[str, Contender] = {
    "ours": ours,
    "trl": functools.partial(trl, checkpointing=True),
    "trl_no_checkpointing": functools.partial(trl, checkpointing=False),
}


if __name__ == "__main__":
    main(CONTENDERS)
