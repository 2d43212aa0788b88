"""The settings of rewards on held-out prompts."""

import dataclasses
import math

from huatuo_jax.core.config import operational


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOutRewardsConfig:
    """Rewards of answers to held-out prompts every few iterations; the best policy is kept.

    `ppo/model` holds the policy with the highest `measure`, the earlier one of equal ones; the
    initial policy is measured too and never kept.

    Attributes:
        every: iterations between two; the last iteration is always measured, those that train the
            critic alone never.
        prompts: file of prompts that no stage trains on.
        num_prompts: so many of them, chosen by their content; None for all.
        num_samples: answers to each prompt.
        temperature: answers are drawn at; None for that of the rollouts.
        measure: the mean `reward`, as it enters training but for its normalisation within groups
            and running statistics; or the name of one of the terms of `reward`, unweighted.
    """

    prompts: str = operational("")
    every: int = 4
    num_prompts: int | None = 64
    num_samples: int = 1
    temperature: float | None = None
    measure: str = "reward"

    def __post_init__(self) -> None:
        """Raises ValueError for a number out of its range."""
        for name in ("every", "num_prompts", "num_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value!r} must be at least 1")
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature!r} must be above 0")
        if not self.prompts:
            raise ValueError("prompts is empty: it must name a file of held-out prompts")
