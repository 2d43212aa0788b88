"""Training stages by name, and running some of them one after the other."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

from huatuo_jax import sft
from huatuo_jax.dpo import stage as dpo
from huatuo_jax.dpo.config import DpoConfig
from huatuo_jax.ppo import stage as ppo
from huatuo_jax.ppo.config import PpoConfig
from huatuo_jax.reward import stage as reward
from huatuo_jax.reward.config import RewardConfig
from huatuo_jax.sft import SftConfig

Run = Callable[[Any, str | os.PathLike[str]], dict[str, Any]]

STAGES: Mapping[str, Run] = {
    sft.STAGE: sft.run_sft,
    reward.STAGE: reward.run_reward,
    dpo.STAGE: dpo.run_dpo,
    ppo.STAGE: ppo.run_ppo,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StagesConfig:
    """Training stages that are run in this order; None leaves a stage out.

    Attributes:
        sft: supervised fine-tuning.
        reward: the reward model.
        dpo: direct preference optimisation.
        ppo: proximal policy optimisation.
    """

    sft: SftConfig | None = None
    reward: RewardConfig | None = None
    dpo: DpoConfig | None = None
    ppo: PpoConfig | None = None

    def __post_init__(self) -> None:
        """Raise ValueError where there is no stage."""
        if not self.stages:
            raise ValueError(f"no stage is given; there are {', '.join(STAGES)}")

    @property
    def stages(self) -> tuple[str, ...]:
        """Those that are run, in order."""
        return tuple(name for name in STAGES if getattr(self, name) is not None)
