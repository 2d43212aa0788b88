"""The settings of an evaluation."""

import dataclasses
import math

from huatuo_jax.config import operational
from huatuo_jax.data.accounting import check_share
from huatuo_jax.feedback.truth_judge import OfflineName
from huatuo_jax.rl.rewards import AnswerScoreConfig
from huatuo_jax.sharding import MeshConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Which models answer which prompts, and how.

    Attributes:
        base: model folder before fine-tuning; None for what the run's fine-tuning began with.
        sft: model folder after fine-tuning, the reference of the KL divergence.
        ppo: model folder after PPO.
        reward: reward model's folder.
        prompts: file of prompts that no stage has trained on, with references where there are any.
        max_left_out_share: share of the prompts that may be left out as too long for the models.
        template: chat template by name.
        default_system: its system text; None for that of the run's fine-tuning, or the template's.
        num_samples: answers of each model to each prompt.
        best_of_n: answers of the SFT model of which the reward model takes the best one; they are
            drawn beside the `num_samples` that stand for SFT. None for `num_samples`, and 2 at
            least.
        max_new_tokens: tokens of an answer at most.
        temperature: answers are drawn at, above 0; None for that of PPO's rollouts, at which reward
            and KL are those that PPO trained for.
        seed: of the answers and of the bootstrap.
        judge: the offline judge of the answers; None for that of the run's labels, else the rubric.
        score: what a score counts, above all that of an answer that was cut off; None for the rule
            of the run's PPO, and for `AnswerScoreConfig()` where there is none.
        rows_at_once: rows of a batch, where answers are scored.
        chunk_size: prompts whose answers are written together.
        slots: answers decoded at once; None for up to 64.
        mesh: how the devices are divided for the answers; losses and scores are computed on others.
    """

    base: str | None = operational(None)
    sft: str = operational("{workdir}/sft/model")
    ppo: str = operational("{workdir}/ppo/model")
    reward: str = operational("{workdir}/reward/model")
    prompts: str = operational("{workdir}/held_out_prompts.jsonl")
    max_left_out_share: float = operational(0.1)
    template: str = "huatuogpt"
    default_system: str | None = None
    num_samples: int = 4
    best_of_n: int | None = None
    max_new_tokens: int = 512
    temperature: float | None = None
    seed: int = 0
    judge: OfflineName | None = None
    score: AnswerScoreConfig | None = None
    rows_at_once: int = operational(8)
    chunk_size: int = operational(256)
    slots: int | None = operational(None)
    mesh: MeshConfig = operational(MeshConfig())

    def __post_init__(self) -> None:
        """Raise ValueError for a number that cannot be."""
        for name in ("num_samples", "max_new_tokens", "rows_at_once", "chunk_size", "slots"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value!r} must be at least 1")
        if self.best_of_n is not None and self.best_of_n < 2:
            raise ValueError(
                f"best_of_n={self.best_of_n!r} must be at least 2, or None for num_samples: the "
                "best of one answer is SFT's own"
            )
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature!r} must be above 0")
        check_share(self.max_left_out_share, name="max_left_out_share")

    @property
    def num_candidates(self) -> int:
        """The n of best-of-n."""
        return max(2, self.num_samples) if self.best_of_n is None else self.best_of_n
