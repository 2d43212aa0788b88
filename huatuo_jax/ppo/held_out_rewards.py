"""Rewards of answers to held-out prompts, by the run's own reward, and the policy they are best of.

Each measure is a function of the policy and the seed alone, so that a resumed run, which takes the
last one again, takes the very same.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from huatuo_jax.generation.requests import Request
from huatuo_jax.ppo.config import PpoConfig
from huatuo_jax.ppo.judging import is_due
from huatuo_jax.ppo.prompts import TokenPrompt
from huatuo_jax.ppo.trainer import PpoState, Trainer
from huatuo_jax.training.metrics import EVALUATION_PREFIX
from huatuo_jax.training.scoring import Normalization
from huatuo_jax.training.update import Variables


class Measured(Protocol):
    """The outcome of a look at held-out answers."""

    @property
    def iteration(self) -> int:
        """The iteration of the policy that gave the answers."""

    def fields(self) -> dict[str, float]:
        """The numbers for `metrics.jsonl`."""


class HeldOutCheck(Protocol):
    """Looks at held-out answers every few iterations, keeps the best policy and may end the run."""

    turned: bool

    def open(self, history: Sequence[Mapping[str, Any]], *, restored: int | None) -> None:
        """Resumes from a checkpoint's history; its iteration is None without one."""

    def to_json(self) -> list[dict[str, Any]]:
        """The history, for a checkpoint."""

    def result(self) -> dict[str, Any]:
        """Which policy was kept, and why the run ended."""

    def is_due(self, iteration: int, *, is_last: bool) -> bool:
        """Tells whether the policy after so many iterations is to be looked at."""

    def judge(self, state: PpoState, trainer: Trainer) -> Measured:
        """Looks at the policy's answers; keeps it where it is the best so far."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOutRewards:
    """A measure of a policy.

    Attributes:
        iteration: whose; 0 for the initial policy.
        measure: what the policy is kept by.
        reward: mean of the answers that have one.
        length: mean tokens of an answer.
        ended: share of answers with an end.
        without_reward: share of answers.
        terms: mean of each term where it applies; those that apply nowhere are not in it.
    """

    iteration: int
    measure: float
    reward: float
    length: float
    ended: float
    without_reward: float
    terms: Mapping[str, float]

    def __str__(self) -> str:
        """Describes it in one line."""
        return (
            f"held-out answers: measure {self.measure:.4f}, reward {self.reward:.4f}, "
            f"length {self.length:.1f}, ended {self.ended:.0%}"
        )

    def fields(self) -> dict[str, float]:
        """Returns the numbers for `metrics.jsonl`."""
        names = ("measure", "reward", "length", "ended", "without_reward")
        found = {f"{EVALUATION_PREFIX}{name}": getattr(self, name) for name in names}
        return found | {
            f"{EVALUATION_PREFIX}reward/{name}": value for name, value in self.terms.items()
        }


@dataclasses.dataclass(kw_only=True)
class HeldOutRewarding:
    """The measures of a run; a `HeldOutCheck`.

    Attributes:
        cfg: the run's settings, with those of its measures.
        prompts: held out.
        normalization: of a reward model that is the reward alone; None for raw scores, and for a
            sum of terms, which normalises by itself.
        keep: is called with the policy's variables where they are the best so far.
        history: of the measures by now, the initial policy's first.
        turned: never; the run does not end by them.
    """

    cfg: PpoConfig
    prompts: Sequence[TokenPrompt]
    normalization: Normalization | None
    keep: Callable[[Variables], None]
    history: list[HeldOutRewards] = dataclasses.field(default_factory=list)
    turned: bool = False

    def open(self, history: Sequence[Mapping[str, Any]], *, restored: int | None) -> None:
        """Resumes from a checkpoint's history."""
        del restored
        self.history = [HeldOutRewards(**row) for row in history]

    def to_json(self) -> list[dict[str, Any]]:
        """Returns the history, for a checkpoint."""
        return [dataclasses.asdict(one) for one in self.history]

    def result(self) -> dict[str, Any]:
        """Returns which policy was kept."""
        best = _best(self.history)
        assert best is not None, "the last iteration is always measured"
        return {
            "kept_iteration": best.iteration,
            "kept_measure": best.measure,
            "best_is_initial": self.history[0].measure >= best.measure,
        }

    def is_due(self, iteration: int, *, is_last: bool) -> bool:
        """Tells whether the policy has to be measured and was not yet."""
        if self.history and self.history[-1].iteration >= iteration:
            return False
        cfg = self.cfg
        if is_last and iteration > cfg.warmup_iterations:
            return True
        return is_due(
            self._cfg.every, iteration, warmup=cfg.warmup_iterations, last=cfg.num_iterations
        )

    def judge(self, state: PpoState, trainer: Trainer) -> HeldOutRewards:
        """Measures the policy; keeps it where it is the best so far.

        Raises:
            ValueError: no answer has a reward, or one of another kind than training's.
        """
        found = self._measured(state, trainer)
        self.history.append(found)
        if _best(self.history) is found:
            self.keep(state.policy.variables)
        return found

    @property
    def _cfg(self) -> Any:
        assert self.cfg.held_out_rewards is not None
        return self.cfg.held_out_rewards

    def _measured(self, state: PpoState, trainer: Trainer) -> HeldOutRewards:
        iteration, number = int(state.iteration), self._cfg.num_samples
        temperature = self._cfg.temperature or self.cfg.rollout.temperature
        sampling = dataclasses.replace(trainer.sampler.sampling, temperature=temperature)
        requests = [
            Request(
                prompt_token_ids=prompt.token_ids,
                sampling=sampling,
                seed=_seed(self.cfg.seed, prompt.id),
                num_answers=number,
            )
            for prompt in self.prompts
        ]
        prompts = [prompt for prompt in self.prompts for _ in range(number)]
        trainer.rewards.begin(f"held-out answers of iteration {iteration}")
        groups = trainer.sampler.answers(
            state.policy.variables,
            requests,
            lambda place, answer: trainer.rewards.take(place, prompts[place], answer),
        )
        answers = [answer for group in groups for answer in group]
        rewards = trainer.rewards.of(prompts, answers, group=None)
        ended_N = np.array([answer.finish_reason == "stop" for answer in answers])
        scores_N = np.asarray(rewards.scores_N, np.float64)
        if self.normalization is not None:
            scores_N = self.normalization.apply(scores_N)
        rewards_N = self.cfg.score.outside_training.rewards(
            jnp.asarray(scores_N, jnp.float32), jnp.asarray(ended_N)
        )
        values_N = np.asarray(rewards_N, np.float64)[rewards.has_reward_N]
        terms = {
            name: float(values[applies].mean(dtype=np.float64))
            for name, (values, applies) in rewards.terms.items()
            if applies.any()
        }
        means = terms | {"reward": float(values_N.mean()) if len(values_N) else np.nan}
        measure = means.get(self._cfg.measure, np.nan)
        if not np.isfinite(measure) or not np.isfinite(means["reward"]):
            raise ValueError(
                f"iteration {iteration}: the held-out answers have no {self._cfg.measure!r} that "
                "is a number: no term applies to them, or the policy is broken"
            )
        return HeldOutRewards(
            iteration=iteration,
            measure=measure,
            reward=means["reward"],
            length=float(np.mean([len(answer.token_ids) for answer in answers])),
            ended=float(ended_N.mean()),
            without_reward=1 - float(rewards.has_reward_N.mean()),
            terms=terms,
        )


def _best(history: Sequence[HeldOutRewards]) -> HeldOutRewards | None:
    """The highest measure of a policy that was trained, the earliest of equal ones."""
    trained = [one for one in history if one.iteration]
    return max(trained, key=lambda one: (one.measure, -one.iteration)) if trained else None


def _seed(seed: int, prompt: str) -> int:
    """The same draw for a prompt at every iteration, so that measures differ by the policy."""
    digest = hashlib.sha256(f"held out {seed} {prompt}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:4], "big")
