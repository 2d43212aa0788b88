"""The settings of a reward stage."""

import dataclasses

from huatuo_jax.core.config import operational
from huatuo_jax.core.sharding import MeshConfig
from huatuo_jax.preferences.data import ComparisonsConfig
from huatuo_jax.preferences.rows import Denominator, RowsConfig
from huatuo_jax.training.initial_model import ComputeSection, ModelConfig
from huatuo_jax.training.loop import LoopConfig
from huatuo_jax.training.micro_batch import (
    MicroBatchSize,
    check_micro_batch_size,
    most_rows_at_once,
)
from huatuo_jax.training.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Pairs that differ in one thing alone, to measure the reward model by: none is trained on.

    Attributes:
        name: what differs, such as `truth`; reports call it so.
        paths: files of comparisons. How often the `chosen` side of a pair gets the higher score is
            what is reported, whatever `p_chosen` says.
        chosen: what the `chosen` side is, such as `true` or `longer`.
        neutral: neither side is the right one, so that 1/2, indifference, is what is wished for.
        encoding: of text files; None tells it by evidence, see `huatuo_jax.data.text`.
    """

    name: str
    paths: tuple[str, ...] = operational(())
    chosen: str = "better"
    neutral: bool = False
    encoding: str | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for a probe without a name or a file."""
        if not self.name:
            raise ValueError("name is empty: a probe is reported by its name")
        if not self.paths:
            raise ValueError(f"paths is empty: probe {self.name!r} must name at least one file")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """A run of reward training.

    Attributes:
        model: the backbone, mostly an SFT model's directory (`{workdir}/sft/model` is that of this
            run); its token head is left out. All of it is trained, or adapters and the head.
        data: the comparisons.
        probes: pairs that differ in one thing alone; the held-out report has each apart, and no
            other figure holds them.
        optimizer: how.
        num_epochs: passes over the comparisons.
        num_steps: optimizer steps instead, where given.
        batch_size: rows of an optimizer step, on all devices together.
        micro_batch_size: rows that go through the model at once, on all devices together; `auto`
            for as many as fit the devices' memory (all of them on CPU), None for all of them.
        denominator: what a step's loss is divided by: its `pairs`, or its `prompts`, where all
            pairs of a prompt together weigh as much as the one pair of another.
        margin_scale: factor of the labels' margins (the chosen answer's score less the rejected
            one's) in the loss; 0 leaves them out.
        centring: factor of the squared sum of a pair's scores in the loss.
        head_init: a fresh head gives scores of about this standard deviation.
        head_only: train the head alone, on a frozen backbone.
        normalization_answers: a file of answers of the SFT model, whose scores shall have mean 0
            and standard deviation 1; None takes the answers that were compared.
        seed: of fresh weights, of the order of the data and of the bootstrap.
        compute: how a step is computed.
        mesh: how the devices are divided.
        loop: evaluation, checkpoints, logging.
    """

    model: ModelConfig
    data: ComparisonsConfig
    probes: tuple[ProbeConfig, ...] = ()
    optimizer: OptimizerConfig
    num_epochs: int = 1
    num_steps: int | None = None
    batch_size: int = 64
    micro_batch_size: MicroBatchSize = operational("auto")
    denominator: Denominator = "pairs"
    margin_scale: float = 0.0
    centring: float = 0.0
    head_init: float = 0.01
    head_only: bool = False
    normalization_answers: str | None = operational(None)
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
        names = [probe.name for probe in self.probes]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"probes: {', '.join(repeated)} stands twice; each needs its own name")
        for name in ("margin_scale", "centring"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)!r} must be 0 or more")
        if not 0 < self.head_init < float("inf"):
            raise ValueError(f"head_init={self.head_init!r} must be above 0")
        check_micro_batch_size(
            self.micro_batch_size, self.batch_size, name=f"batch_size={self.batch_size}"
        )
        if self.head_only and self.model.lora is not None:
            raise ValueError("head_only=True needs model.lora=None: adapters would not be trained")

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
            denominator=self.denominator,
            shuffled=shuffled,
            seed=self.seed,
        )
