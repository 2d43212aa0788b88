"""One contender of `benchmarks/reward.py`, in a process of its own.

    python benchmarks/reward_contenders.py NAME FOLDER THREADS

FOLDER holds `model/` (Hugging Face, with tokenizer), `batches.npz` (packed rows and pairs, `[steps,
B, ...]`), `pairs.json` (the same pairs as token ids, a list for each step) and `settings.json`.
What was measured is the last line that is printed, as JSON. Libraries are imported where they are
used, so that no contender's memory holds another's.
"""

import functools
import json
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from sft_contenders import Marks, peak_memory, read_batches


def ours(folder: pathlib.Path, settings: dict[str, Any]) -> dict[str, Any]:
    """This project's update, on packed rows, as `huatuo_jax.reward` compiles and feeds it."""
    import jax

    from huatuo_jax import sharding
    from huatuo_jax.reward.losses import reward_loss
    from huatuo_jax.reward.model import InitialRewardModel
    from huatuo_jax.training.initial_model import ComputeSection, ModelConfig, open_model
    from huatuo_jax.training.loop import put_on_mesh
    from huatuo_jax.training.optimizer import OptimizerConfig, make_optimizer
    from huatuo_jax.training.update import compile_update, make_update

    section = ComputeSection(**settings["ours"]["compute"])
    base = open_model(ModelConfig(directory=str(folder / "model")), section.compute_config())
    model = InitialRewardModel(base=base, head_init=0.01, head_only=False)
    mesh = sharding.make_mesh()
    optimizer = make_optimizer(
        OptimizerConfig(decay="constant", **settings["optimizer"]), num_steps=settings["num_steps"]
    )
    update = compile_update(
        make_update(
            functools.partial(reward_loss, model.transformer),
            optimizer,
            num_micro_batches=settings["ours"]["num_micro_batches"],
        ),
        model.abstract_state(optimizer, mesh),
        mesh,
    )
    state = model.make_state(jax.random.key(0), optimizer, mesh)
    losses, pairs = [], []
    marks = Marks(settings["num_warmup"])
    for batch in read_batches(folder):
        state, metrics = update(state, put_on_mesh(batch, mesh))
        losses.append(float(metrics["loss"]) / float(metrics["num_terms"]))
        pairs.append(int(metrics["pairs"]))
        marks.step_ended()
    return report(marks, losses, pairs)


def trl(folder: pathlib.Path, settings: dict[str, Any], *, checkpointing: bool) -> dict[str, Any]:
    """TRL's RewardTrainer on the same pairs, already tokenised.

    All that concerns speed is its default (but for float32, the pairs of a step and, where the
    contender's name says so, gradient checkpointing): it pads both answers of all pairs to the
    longest.
    """
    import datasets
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.trainer_callback import TrainerCallback
    from trl import RewardConfig, RewardTrainer

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks.step_ended()

    marks = Marks(settings["num_warmup"])
    by_step = json.loads((folder / "pairs.json").read_text(encoding="utf-8"))
    hyper = settings["optimizer"]
    trainer = RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(
            folder / "model", dtype=torch.float32
        ),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        train_dataset=datasets.Dataset.from_list([pair for step in by_step for pair in step]),
        callbacks=[Clock()],
        args=RewardConfig(
            output_dir=str(folder / "trl"),
            max_length=settings["max_length"],
            per_device_train_batch_size=settings["pairs_per_step"],
            max_steps=settings["num_steps"],
            gradient_checkpointing=checkpointing,
            bf16=False,
            use_cpu=True,
            learning_rate=hyper["learning_rate"],
            lr_scheduler_type="constant",
            weight_decay=hyper["weight_decay"],
            adam_beta1=hyper["beta1"],
            adam_beta2=hyper["beta2"],
            adam_epsilon=hyper["epsilon"],
            max_grad_norm=hyper["clip_norm"],
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
    )
    collate = trainer.data_collator
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model.train(), collate(by_step[0])).item()
    pairs: list[int] = []

    def collate_and_count(examples: list[dict[str, Any]]) -> Any:
        pairs.append(len(examples))
        return collate(examples)

    trainer.data_collator = collate_and_count
    trainer.train()
    return report(marks, [loss], pairs)


def report(marks: Marks, losses: list[float], pairs: list[int]) -> dict[str, Any]:
    """What a contender hands back; `pairs` are those of the steps in `seconds`."""
    seconds = marks.seconds
    counted = pairs[marks.num_warmup : marks.num_warmup + len(seconds)]
    return {"losses": losses, "seconds": seconds, "pairs": counted}


CONTENDERS: dict[str, Callable[[pathlib.Path, dict[str, Any]], dict[str, Any]]] = {
    "ours": ours,
    "trl": functools.partial(trl, checkpointing=True),
    "trl_no_checkpointing": functools.partial(trl, checkpointing=False),
}


def main(name: str, folder: pathlib.Path, num_threads: int) -> None:
    """Runs one contender on so many cores."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:num_threads])
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    result = CONTENDERS[name](folder, settings)
    print(json.dumps(result | {"peak_memory": peak_memory()}))


if __name__ == "__main__":
    main(sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3]))
