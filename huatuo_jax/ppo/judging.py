"""The rules of the judgings of held-out answers: when, what is kept, when the run stops.

A policy that is trained long enough against a reward model comes to answers which that model
overrates: its reward keeps rising while what the reward stands for falls (Gao et al. 2022,
arXiv 2210.10760, who find the turn with a gold reward model). Here the judge, whose verdicts the
reward model was trained on, is asked anew about held-out answers of the policy, each paired with
one of the initial policy.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from huatuo_jax.core.config import operational
from huatuo_jax.judge.config import JudgeConfig
from huatuo_jax.training.metrics import JUDGED_PREFIX


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgingConfig:
    """Judgings of held-out answers: how often, by whom, and when the run stops.

    At each judging the judge compares an answer of the policy with one of the initial policy to
    the same prompt, in both orders. The policy's share of the points (1 for a win, 1/2 for a tie
    or for orders that contradict each other) decides: `ppo/model` holds the policy of the judging
    with the highest share, the earlier one of equal shares.

    The run stops at a judging where both hold: the last `patience` judgings all have a share below
    the best one so far, and the last mean reward is above that of the best judging. Below the best
    alone may be noise, or a policy that gets worse by the reward's own measure, which later
    iterations repair; only where the reward still rises does training move away from what the
    judge prefers. The initial policy counts among the judgings with a share of 1/2, which is what
    it has against itself, so that a run also stops where the judge prefers the initial policy from
    the beginning.

    Attributes:
        every: iterations between two judgings; the last iteration is always judged, those that
            train the critic alone never.
        prompts: file of prompts that no stage trains on; None for the recipe's held-out prompts.
        num_prompts: so many of them, chosen by their content; None for all.
        num_samples: answers of either policy to each prompt.
        patience: judgings in a row below the best one after which the run may stop; None never
            stops it.
        temperature: answers are drawn at; None for that of the rollouts.
        judge: who judges; None for the recipe's judge, of `labels`.
        concurrency: questions under way at once.
        spending: file of what the judge's calls cost; the budget is for all calls in it. None for
            one of the judgings alone, in the recipe for that of the labels.
    """

    every: int = 4
    prompts: str | None = operational(None)
    num_prompts: int | None = 64
    num_samples: int = 1
    patience: int | None = 3
    temperature: float | None = None
    judge: JudgeConfig | None = None
    concurrency: int = operational(8)
    spending: str | None = operational(None)

    def __post_init__(self) -> None:
        """Raises ValueError for a number out of its range."""
        for name in ("every", "num_prompts", "num_samples", "patience", "concurrency"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value!r} must be at least 1")
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature!r} must be above 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judged:
    """Outcome of a judging; the initial policy's is iteration 0.

    Attributes:
        iteration: whose policy was judged.
        share: of the points against the initial policy.
        share_low: of its 95 % interval over prompts.
        share_high: of its 95 % interval over prompts.
        reward: mean over the same answers of what the reward holds of the reward model's score.
        kl_per_sequence: mean log-ratio to the reference of the same answers, in nats.
        length: mean tokens of an answer.
        pairs: of answers with a verdict, equal answers (ties, which nobody is asked about) too.
        failed: pairs without a verdict, which count nowhere.
        cost: of the verdicts; None where there is no price.
    """

    iteration: int
    share: float
    share_low: float
    share_high: float
    reward: float
    kl_per_sequence: float
    length: float
    pairs: int
    failed: int
    cost: float | None

    def __str__(self) -> str:
        """Describes it in one line."""
        if not self.iteration:
            return f"initial policy, held-out answers: reward {self.reward:.3f}"
        failed = f", {self.failed} failed" if self.failed else ""
        return (
            f"judged: {self.share:.3f} [{self.share_low:.3f}, {self.share_high:.3f}] of the points "
            f"against the initial policy ({self.pairs} pairs{failed}), "
            f"reward {self.reward:.3f}, KL {self.kl_per_sequence:.3f}, length {self.length:.1f}"
        )

    def fields(self) -> dict[str, float]:
        """Returns the numbers for `metrics.jsonl`."""
        numbers = dataclasses.asdict(self)
        del numbers["iteration"]
        return {
            f"{JUDGED_PREFIX}{name}": value for name, value in numbers.items() if value is not None
        }


def is_due(every: int, iteration: int, *, warmup: int, last: int) -> bool:
    """Tells whether the policy after so many iterations is to be judged.

    Args:
        every: iterations between two judgings.
        iteration: 0 for the initial policy.
        warmup: first iterations that leave the policy as it is.
        last: iterations in all.
    """
    if iteration == 0:
        return True
    return iteration > warmup and (iteration % every == 0 or iteration == last)


def best_of(history: Sequence[Judged]) -> Judged:
    """Returns the judging with the highest share, the earliest of equal ones."""
    return max(history, key=lambda one: (one.share, -one.iteration))


def kept_of(history: Sequence[Judged]) -> Judged | None:
    """Returns the best judging of a policy that was trained; None before there is one."""
    trained = [one for one in history if one.iteration]
    return best_of(trained) if trained else None


def has_turned(history: Sequence[Judged], *, patience: int | None) -> bool:
    """Tells whether the judge has turned while the reward still rises, see `JudgingConfig`.

    Args:
        history: all judgings in order, the initial policy's first.
        patience: judgings in a row that have to be below the best one.
    """
    best, last = best_of(history), history[-1]
    if patience is None or len(history) <= patience:
        return False
    below = all(one.share < best.share for one in history[-patience:])
    return below and last.reward > best.reward


def outcome(history: Sequence[Judged], *, turned: bool) -> dict[str, Any]:
    """Returns the judgings' part of the result: which policy was kept, and why the run ended."""
    kept, best, last = kept_of(history), best_of(history), history[-1]
    assert kept is not None, "the last iteration is always judged"
    ended = "all iterations"
    if turned:
        ended = (
            f"the judge turned at iteration {last.iteration} while the reward rose from "
            f"{best.reward:.3f} to {last.reward:.3f}"
        )
    return {
        "kept_iteration": kept.iteration,
        "kept_share": kept.share,
        "kept_share_low": kept.share_low,
        "kept_share_high": kept.share_high,
        "best_is_initial": best.iteration == 0,
        "ended": ended,
    }


def from_json(rows: Sequence[Mapping[str, Any]]) -> list[Judged]:
    """Reads a history as a checkpoint holds it: the fields of each judging."""
    return [Judged(**row) for row in rows]
