"""Dynamic sampling: groups of equal rewards are replaced by groups to further prompts.

Where all answers to a prompt have the same reward, a comparison of them is 0, and the step is taken
on fewer answers than it could be (DAPO, arXiv 2503.14476, section 3.2).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from huatuo_jax.generation.requests import Answer
from huatuo_jax.ppo.advantages import have_variance
from huatuo_jax.ppo.prompts import TokenPrompt
from huatuo_jax.ppo.reward_mix import Flags, Floats, Rewards
from huatuo_jax.ppo.rollout import Rollout

Groups = npt.NDArray[np.int64]


class Drawn(NamedTuple):
    """A rollout with its rewards.

    Attributes:
        rollout: prompts and answers.
        rewards: of the answers.
        num_prompts: that were asked for it, those of replaced groups among them.
    """

    rollout: Rollout
    rewards: Rewards
    num_prompts: int


Draw = Callable[[int, int, int], tuple[Rollout, Rewards]]
"""From the round, the place of its first prompt after the rollout's first, and how many prompts."""

Lay = Callable[[Sequence[TokenPrompt], Sequence[Answer]], Rollout]


def with_variance(draw: Draw, lay: Lay, *, num_prompts: int, rounds: int) -> Drawn:
    """Draws a rollout, and in so many rounds at most anew for its groups of equal rewards.

    Args:
        draw: makes groups.
        lay: makes a rollout of groups.
        num_prompts: of the rollout.
        rounds: 0 for none.
    """
    rollout, rewards = draw(0, 0, num_prompts)
    asked = num_prompts
    for number in range(1, rounds + 1):
        equal = _equal(rewards, num_prompts)
        if not len(equal):
            break
        more, found = draw(number, asked, len(equal))
        asked += len(equal)
        rollout = _replaced(rollout, equal, more, lay)
        rewards = _replaced_rewards(rewards, equal, found, num_prompts)
    return Drawn(rollout, rewards, asked)


def _equal(rewards: Rewards, num_prompts: int) -> Groups:
    """The numbers of the groups of equal rewards."""
    scores_PG = jnp.asarray(rewards.scores_N).reshape(num_prompts, -1)
    applies_PG = jnp.asarray(rewards.has_reward_N).reshape(num_prompts, -1)
    return np.flatnonzero(~np.asarray(have_variance(scores_PG, applies_BG=applies_PG)))


def _replaced(rollout: Rollout, equal: Groups, more: Rollout, lay: Lay) -> Rollout:
    group = len(rollout.answers) // len(rollout.prompts)
    prompts, answers = list(rollout.prompts), list(rollout.answers)
    for new, old in enumerate(equal.tolist()):
        prompts[old] = more.prompts[new]
        answers[old * group : (old + 1) * group] = more.answers[new * group : (new + 1) * group]
    return lay(prompts, answers)


def _replaced_rewards(rewards: Rewards, equal: Groups, more: Rewards, num_prompts: int) -> Rewards:
    def merged(old_N: npt.NDArray[Any], new_N: npt.NDArray[Any]) -> npt.NDArray[Any]:
        whole_PG = old_N.reshape(num_prompts, -1).copy()
        whole_PG[equal] = new_N.reshape(len(equal), -1)
        return whole_PG.reshape(-1)

    terms: Mapping[str, tuple[Floats, Flags]] = {
        name: (merged(values, more.terms[name][0]), merged(applies, more.terms[name][1]))
        for name, (values, applies) in rewards.terms.items()
    }
    return Rewards(
        merged(rewards.scores_N, more.scores_N),
        merged(rewards.has_reward_N, more.has_reward_N),
        terms,
        more.judge,  # It counts the whole iteration.
    )
