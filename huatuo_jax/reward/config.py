"""The settings of a reward stage."""

import dataclasses

from huatuo_jax.core.config import operational
from huatuo_jax.preferences.rows import Denominator, PreferenceConfig, RowsConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Pairs that differ in one thing alone, to measure the reward model by: none is trained on.

    Attributes:
        name: what differs, such as `truth`; its name in reports.
        paths: files of comparisons. How often the `chosen` side of a pair gets the higher score is
            what is reported, whatever `p_chosen` says.
        chosen: what the `chosen` side is, such as `true` or `longer`.
        neutral: neither side is right, so that 1/2, indifference, is the best value.
        encoding: of text files; None tells it by evidence, see `huatuo_jax.data.text`.
    """

    name: str
    paths: tuple[str, ...] = operational(())
    chosen: str = "better"
    neutral: bool = False
    encoding: str | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for a probe without a name or a file."""
        if not self.name:
            raise ValueError("name is empty: a probe is reported by its name")
        if not self.paths:
            raise ValueError(f"paths is empty: probe {self.name!r} must name at least one file")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardConfig(PreferenceConfig):
    """A run of reward training.

    Attributes:
        model: the backbone, mostly an SFT model's directory (`{workdir}/sft/model` is that of this
            run); its token head is left out. All of it is trained, or adapters and the head.
        probes: pairs that differ in one thing alone; the held-out report has each apart, and no
            other figure holds them.
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
    """

    probes: tuple[ProbeConfig, ...] = ()
    denominator: Denominator = "pairs"
    margin_scale: float = 0.0
    centring: float = 0.0
    head_init: float = 0.01
    head_only: bool = False
    normalization_answers: str | None = operational(None)

    def __post_init__(self) -> None:
        """Raises ValueError for a number out of its range, or fields that contradict each other."""
        super().__post_init__()
        names = [probe.name for probe in self.probes]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"probes: {', '.join(repeated)} is given twice; each probe needs its own name"
            )
        for name in ("margin_scale", "centring"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)!r} must be 0 or more")
        if not 0 < self.head_init < float("inf"):
            raise ValueError(f"head_init={self.head_init!r} must be above 0")
        if self.head_only and self.model.lora is not None:
            raise ValueError("head_only=True needs model.lora=None: adapters would not be trained")

    def rows(self, *, shuffled: bool, denominator: Denominator | None = None) -> RowsConfig:
        """Returns how comparisons become rows, to train on or to evaluate."""
        return super().rows(shuffled=shuffled, denominator=denominator or self.denominator)
