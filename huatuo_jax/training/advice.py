"""What to change in a config whose program does not fit."""

from typing import Protocol

from huatuo_jax import sharding
from huatuo_jax.training.initial_model import ComputeSection, ModelConfig
from huatuo_jax.training.programs import GIB, StageProgram, bytes_on_device


class TrainingSection(Protocol):
    """What the settings of all training stages have."""

    @property
    def model(self) -> ModelConfig:
        """What is trained."""

    @property
    def compute(self) -> ComputeSection:
        """How a step is computed."""

    @property
    def micro_batch_size(self) -> object:
        """Rows that go through a model at once."""


def advice(program: StageProgram, cfg: TrainingSection, *, capacity: int) -> list[str]:
    """The fields that would help, those first that cost least.

    Args:
        program: the one that does not fit.
        cfg: of its stage.
        capacity: bytes of a device.
    """
    name, found = f"config.{program.stage}", []
    given = bytes_on_device((program.arguments, program.beside))
    compute, shards = cfg.compute, sharding.batch_shards(program.mesh)
    if compute.compute_dtype == "float32":
        found.append(f"{name}.compute.compute_dtype='bfloat16' halves activations")
    if program.attends and compute.remat != "full" and not _of_engine(program):
        found.append(
            f"{name}.compute.remat='full' (now {compute.remat!r}) keeps the input of each layer "
            "and computes the rest again"
        )
    if program.attends and program.rows_at_once > shards and not _of_engine(program):
        found.append(
            f"{name}.micro_batch_size={shards} (now {cfg.micro_batch_size}): one row at once "
            "on each device; activations shrink with it, the result stays"
        )
    if _of_engine(program):
        found.append(f"{name}.rollout.slots: fewer answers at once take less cache")
    if given > capacity // 2:
        found.append(
            f"weights, moments and what else is held take {given / GIB:.1f} GiB of each device's "
            f"{capacity / GIB:.0f} before anything is computed: "
            + "; ".join(_smaller_states(name, cfg, program))
        )
    elif program.attends and compute.loss_chunk > 128:
        found.append(f"{name}.compute.loss_chunk=128 (now {compute.loss_chunk}): fewer logits")
    if program.mesh.shape["tensor"] == 1:
        mesh = f"{name}.rollout.mesh" if _of_engine(program) else f"{name}.mesh"
        found.append(
            f"{mesh}.tensor=2 or more splits heads, feed-forward and vocabulary of each row"
        )
    return found


def _of_engine(program: StageProgram) -> bool:
    return program.name.endswith(("move", "decode", "prefill"))


def _smaller_states(name: str, cfg: TrainingSection, program: StageProgram) -> list[str]:
    ways = []
    if program.mesh.shape["data"] > 1:
        ways.append(f"{name}.mesh.data=1 with more fsdp, as data holds copies")
    if cfg.model.lora is None:
        ways.append(f"{name}.model.lora trains adapters, which alone have gradients and moments")
    return [*ways, "or a larger slice"]
