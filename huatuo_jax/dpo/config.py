"""The settings of a DPO stage."""

import dataclasses

from huatuo_jax.comparisons.data import ComparisonsConfig
from huatuo_jax.comparisons.rows import RowsConfig
from huatuo_jax.config import operational
from huatuo_jax.sharding import MeshConfig
from huatuo_jax.training.initial_model import ComputeSection, ModelConfig
from huatuo_jax.training.loop import LoopConfig
from huatuo_jax.training.micro_batch import (
    MicroBatchSize,
    check_micro_batch_size,
    most_rows_at_once,
)
from huatuo_jax.training.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DpoConfig:
    """A run of direct preference optimisation (arXiv 2305.18290).

    Attributes:
        model: the policy to start from, which is the reference too, mostly an SFT model's directory
            (`{workdir}/sft/model` is that of this run). With `lora` policy and reference share the
            frozen weights, the reference being the model without its adapters.
        data: the comparisons, those that a reward model would be trained on.
        optimizer: how.
        beta: how strongly the reference holds; PPO's `kl_coef` for the same optimum.
        num_epochs: passes over the comparisons.
        num_steps: optimizer steps instead, where given.
        batch_size: rows of an optimizer step, on all devices together.
        micro_batch_size: rows that go through the model at once, on all devices together; `auto`
            for as many as fit the devices' memory (all of them on CPU), None for all of them.
        seed: of fresh adapters and of the order of the data.
        compute: how a step is computed.
        mesh: how the devices are divided.
        loop: evaluation, checkpoints, logging.
    """

    model: ModelConfig
    data: ComparisonsConfig
    optimizer: OptimizerConfig
    beta: float = 0.1
    num_epochs: int = 1
    num_steps: int | None = None
    batch_size: int = 32
    micro_batch_size: MicroBatchSize = operational("auto")
    seed: int = 0
    compute: ComputeSection = ComputeSection()
    mesh: MeshConfig = operational(MeshConfig())
    loop: LoopConfig = operational(LoopConfig())

    def __post_init__(self) -> None:
        """Raise ValueError for a number that cannot be."""
        for name in ("num_epochs", "num_steps", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value!r} must be at least 1")
        if not 0 < self.beta < float("inf"):
            raise ValueError(f"beta={self.beta!r} must be above 0")
        check_micro_batch_size(
            self.micro_batch_size, self.batch_size, name=f"batch_size={self.batch_size}"
        )

    @property
    def rows_at_once(self) -> int:
        """Rows that go through the model together; at most, where `auto` is not settled yet."""
        return most_rows_at_once(self.micro_batch_size, self.batch_size)

    def rows(self, *, shuffled: bool) -> RowsConfig:
        """How comparisons become rows, to train on or to evaluate."""
        return RowsConfig(
            row_length=self.data.row_length,
            packed=self.data.packed,
            window=self.data.window,
            shuffled=shuffled,
            seed=self.seed,
        )
