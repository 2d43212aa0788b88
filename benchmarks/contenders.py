"""What contenders share: sizes of models, clock, memory, batches, how ours and TRL train.

A contender runs as `python SCRIPT NAME FOLDER THREADS`, in a process of its own; FOLDER holds
`batches.npz` (packed rows, `[steps, B, ...]`) and `settings.json` beside its model. What was
measured is the last line that is printed, as JSON. Libraries are imported where they are used, so
that no contender's memory holds another's.
"""

import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from huatuo_jax.backbone.config import BackboneConfig
    from huatuo_jax.backbone.transformer import Head

Batch = dict[str, np.ndarray]
Settings = dict[str, Any]
Result = dict[str, Any]
Contender = Callable[[pathlib.Path, Settings], Result]


class Shape(NamedTuple):
    """A model's; `others` are further fields of its `BackboneConfig`."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int | None = None
    others: Mapping[str, Any] = {"family": "llama"}


SHAPES = {
    "tiny": Shape(64, 160, 2, 2, 2),
    "10m": Shape(256, 704, 8, 4, 4),
    "50m": Shape(512, 1408, 14, 8, 8),
    # Qwen2.5-0.5B, with random weights.
    "494m": Shape(
        *(896, 4864, 24, 14, 2, 151_936),
        {"family": "qwen2", "qkv_bias": True, "tie_embeddings": True},
    ),
}


def backbone(size: str, *, vocab_size: int, max_positions: int, **others: Any) -> "BackboneConfig":
    """The architecture of a size.

    Args:
        size: one of `SHAPES`.
        vocab_size: where the size has none of its own.
        max_positions: the model's context length.
        others: further fields.
    """
    from huatuo_jax.backbone.config import BackboneConfig

    shape = SHAPES[size]
    return BackboneConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.hidden_size // shape.num_heads,
        vocab_size=shape.vocab_size or vocab_size,
        max_positions=max_positions,
        **shape.others,
        **others,
    )


class Marks:
    """The moments at which steps ended; the warm-up's are not counted."""

    def __init__(self, num_warmup: int) -> None:
        """Counts steps after the first `num_warmup`."""
        self.num_warmup = num_warmup
        self._moments: list[float] = []

    def step_ended(self) -> None:
        """Notes a step's end."""
        self._moments.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        """Of each step after the warm-up, data and all."""
        return np.diff(self._moments[self.num_warmup - 1 :]).tolist()

    def report(self, losses: list[float], counts: list[int]) -> Result:
        """What a contender hands back.

        Args:
            losses: of the first steps, or of the first one.
            counts: trained tokens or pairs of every step; those of the steps in `seconds` stay.
        """
        seconds = self.seconds
        counted = counts[self.num_warmup : self.num_warmup + len(seconds)]
        return {"losses": losses, "seconds": seconds, "counts": counted}


def read_batches(folder: pathlib.Path) -> Iterator[Batch]:
    """The packed batches of all steps, `[B, ...]` each."""
    with np.load(folder / "batches.npz") as file:
        arrays = {name: file[name] for name in file}
    for step in range(len(arrays["token_ids"])):
        yield {name: array[step] for name, array in arrays.items()}


def train_ours(
    folder: pathlib.Path,
    settings: Settings,
    make_loss: Callable[[Any, Any], Any],
    *,
    head: "Head",
    counted: str,
) -> Result:
    """This project's update on packed rows, compiled and fed as its stages do it.

    Args:
        folder: with the model and the batches.
        settings: of the contest.
        make_loss: gives the loss of variables and batch for a Transformer and a ComputeSection.
        head: of the model.
        counted: the metric that says how much a step trained on.
    """
    import jax

    from huatuo_jax.core import sharding
    from huatuo_jax.training.initial_model import ComputeSection, ModelConfig, open_model
    from huatuo_jax.training.loop import put_on_mesh
    from huatuo_jax.training.optimizer import OptimizerConfig, make_optimizer
    from huatuo_jax.training.update import compile_update, make_update

    section = ComputeSection(**settings["ours"]["compute"])
    model = open_model(
        ModelConfig(directory=str(folder / "model")), section.compute_config(), head=head
    )
    mesh = sharding.make_mesh()
    optimizer = make_optimizer(
        OptimizerConfig(decay="constant", **settings["optimizer"]), num_steps=settings["num_steps"]
    )
    update = compile_update(
        make_update(
            make_loss(model.transformer, section),
            optimizer,
            num_micro_batches=settings["ours"]["num_micro_batches"],
        ),
        model.abstract_state(optimizer, mesh),
        mesh,
    )
    state = model.make_state(jax.random.key(0), optimizer, mesh)
    losses, counts = [], []
    marks = Marks(settings["num_warmup"])
    for batch in read_batches(folder):
        state, metrics = update(state, put_on_mesh(batch, mesh))
        losses.append(float(metrics["loss"]) / float(metrics["num_terms"]))
        counts.append(int(metrics[counted]))
        marks.step_ended()
    return marks.report(losses, counts)


def trl_settings(folder: pathlib.Path, settings: Settings) -> dict[str, Any]:
    """Settings that TRL's trainers share; for speed all is its default, but the dtype."""
    hyper = settings["optimizer"]
    return {
        "output_dir": str(folder / "trl"),
        "max_steps": settings["num_steps"],
        "bf16": settings["dtype"] == "bfloat16",
        "use_cpu": True,
        "learning_rate": hyper["learning_rate"],
        "lr_scheduler_type": "constant",
        "weight_decay": hyper["weight_decay"],
        "adam_beta1": hyper["beta1"],
        "adam_beta2": hyper["beta2"],
        "adam_epsilon": hyper["epsilon"],
        "max_grad_norm": hyper["clip_norm"],
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def train_trl(
    trainer: Any,
    settings: Settings,
    first: list[Any],
    count: Callable[[list[Any], Any], int],
) -> Result:
    """Runs a trainer of TRL; its loss is that of our first batch, before any step.

    Args:
        trainer: not yet run.
        settings: of the contest.
        first: what our first batch holds, as its collator takes it.
        count: how much a step trains on, from what was collated and what it became.
    """
    import torch
    from transformers.trainer_callback import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks.step_ended()

    marks = Marks(settings["num_warmup"])
    trainer.add_callback(Clock())
    collate = trainer.data_collator
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model.train(), collate(first)).item()
    counts: list[int] = []

    def collate_and_count(examples: list[Any]) -> Any:
        collated = collate(examples)
        counts.append(count(examples, collated))
        return collated

    trainer.data_collator = collate_and_count
    trainer.train()
    return marks.report([loss], counts)


def peak_memory() -> int:
    """The most bytes of this process that stood in memory at once.

    From the kernel's own mark: `getrusage` would count the process that started this one.
    """
    status = pathlib.Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def main(contenders: Mapping[str, Contender]) -> None:
    """Runs the contender that the command line names, on so many cores."""
    name, folder, num_threads = sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3])
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:num_threads])
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    result = contenders[name](folder, settings)
    print(json.dumps(result | {"peak_memory": peak_memory()}))
