"""Training stages by name, and running some of them one after the other."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any, Literal

from huatuo_jax.config import operational
from huatuo_jax.dpo import stage as dpo
from huatuo_jax.dpo.config import DpoConfig
from huatuo_jax.ppo import stage as ppo
from huatuo_jax.ppo.config import PpoConfig
from huatuo_jax.reward import stage as reward
from huatuo_jax.reward.config import RewardConfig
from huatuo_jax.sft import STAGE as SFT
from huatuo_jax.sft import SftConfig, run_sft
from huatuo_jax.sharding import MeshConfig
from huatuo_jax.training.initial_model import ComputeSection

Run = Callable[[Any, str | os.PathLike[str]], dict[str, Any]]

STAGES: Mapping[str, Run] = {
    SFT: run_sft,
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
        base_model: the model that the first stage starts from, instead of the card's: a Hub id, a
            folder in Hugging Face format or of ours, or a preset's name. Template and settings
            follow from it, see `huatuo_jax.rlaif.base_model`; fields given beside it replace them.
        trained: `weights` or `adapters` of the base model; None decides by its size.
        data: files of one's own for the first stage, separated by commas: dialogues, comparisons,
            or prompts; None for the card's.
        template: chat template of all stages, by name; None for that of each stage.
        max_length: tokens of a dialogue in all stages: rows of fine-tuning, prompt and response in
            the others; None for that of each stage.
        compute: how all training stages compute; None for that of each stage.
        mesh: how all training stages divide the devices; None for that of each stage.
    """

    base_model: str | None = operational(None)  # Its files decide.
    trained: Literal["weights", "adapters"] | None = operational(None)
    data: str | None = operational(None)
    template: str | None = operational(None)  # Each of these decides through the stages' fields.
    max_length: int | None = operational(None)
    compute: ComputeSection | None = operational(None)
    mesh: MeshConfig | None = operational(None)
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
