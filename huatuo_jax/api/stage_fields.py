"""The fields of the stages' configs as keywords, beside the model and the data."""

from typing import TypedDict

from huatuo_jax.clinic.files import ClinicConfig
from huatuo_jax.comparisons.rows import Denominator as PairsDenominator
from huatuo_jax.generation.samples import SamplesConfig
from huatuo_jax.ppo.config import (
    Denominator,
    Estimator,
    KlPlace,
    PpoLoopConfig,
    RolloutConfig,
    ScoreConfig,
    ValueConfig,
)
from huatuo_jax.ppo.judging import JudgingConfig
from huatuo_jax.reward.config import ProbeConfig
from huatuo_jax.sharding import MeshConfig
from huatuo_jax.training.initial_model import ComputeSection
from huatuo_jax.training.loop import LoopConfig
from huatuo_jax.training.micro_batch import MicroBatchSize
from huatuo_jax.training.optimizer import OptimizerConfig


class _Common(TypedDict, total=False):
    """What all stages have."""

    optimizer: OptimizerConfig
    num_epochs: int
    micro_batch_size: MicroBatchSize
    seed: int
    compute: ComputeSection
    mesh: MeshConfig


class _Steps(_Common, total=False):
    """What the stages have that train on data."""

    num_steps: int | None
    batch_size: int
    loop: LoopConfig


class SftFields(_Steps, total=False):
    """The fields of `huatuo_jax.sft.SftConfig`."""

    clinic: ClinicConfig | None
    samples: SamplesConfig


class RewardFields(_Steps, total=False):
    """The fields of `huatuo_jax.reward.config.RewardConfig`."""

    probes: tuple[ProbeConfig, ...]
    denominator: PairsDenominator
    margin_scale: float
    centring: float
    head_init: float
    head_only: bool
    normalization_answers: str | None


class DpoFields(_Steps, total=False):
    """The fields of `huatuo_jax.dpo.config.DpoConfig`."""

    beta: float


class PpoFields(_Common, total=False):
    """The fields of `huatuo_jax.ppo.config.PpoConfig`."""

    value: ValueConfig
    rollout: RolloutConfig
    score: ScoreConfig
    estimator: Estimator
    divide_by_deviation: bool
    gamma: float
    gae_lambda: float
    whiten_advantages: bool
    kl_coef: float
    kl_in: KlPlace
    target_kl_per_sequence: float | None
    kl_gain: float
    clip_low: float
    clip_high: float
    dual_clip: float | None
    entropy_coef: float
    denominator: Denominator
    num_iterations: int
    num_minibatches: int
    stop_at_kl: float | None
    packed: bool
    loop: PpoLoopConfig
    judging: JudgingConfig | None
