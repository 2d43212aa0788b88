"""Best-of-n sampling as a model of its own: of n SFT answers, the reward model's best one.

The n answers are drawn beside those that stand for SFT, so that no answer is compared with itself
and none of SFT's is known to be worse: compared with the n - 1 answers that were not chosen, the
best one would always have the higher reward, where it has it over a fresh answer with probability
n / (n + 1).
"""

import dataclasses
import math
from collections.abc import Sequence

from huatuo_jax.evaluation.answers import ScoredAnswers

BEST_OF_N = "best_of_n"


def best_answers(drawn: ScoredAnswers) -> ScoredAnswers:
    """The answer with the highest reward to each prompt; the first one of equals.

    An answer without a reward, which is too long for the reward model, is taken only where none
    has one.
    """
    best = {name: _best_place(rewards) for name, rewards in drawn.rewards.items()}
    return drawn.pick({name: slice(index, index + 1) for name, index in best.items()})


def repeated(best: ScoredAnswers, *, as_often_as: ScoredAnswers) -> ScoredAnswers:
    """The one answer to each prompt, as often as another model has answers to compare it with."""
    return best._replace(
        answered=[
            dataclasses.replace(
                one,
                answers=one.answers * len(other.answers),
                sampled=one.sampled * len(other.answers),
            )
            for one, other in zip(best.answered, as_often_as.answered, strict=True)
        ]
    )


def kl_upper_bound(n: int) -> float:
    """No best-of-n policy is further from its model than this: log n - (n - 1) / n nats an answer.

    Stiennon et al. 2020 (arXiv 2009.01325) give it as the KL divergence; Beirami et
    al. 2024 (arXiv 2401.01879) show that it is an upper bound, reached where no answer is drawn
    twice.
    """
    return math.log(n) - (n - 1) / n


def _best_place(rewards: Sequence[float | None]) -> int:
    ranks = [-math.inf if reward is None else reward for reward in rewards]
    return ranks.index(max(ranks))
