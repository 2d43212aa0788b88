"""Reports an iteration: its metrics, its speed, and samples of its answers."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from huatuo_jax.ppo.config import PpoConfig
from huatuo_jax.ppo.metrics import policy_numbers
from huatuo_jax.ppo.reward_mix import Rewards
from huatuo_jax.ppo.rollout import Rollout
from huatuo_jax.ppo.targets import Targets, rollout_fields
from huatuo_jax.training.metrics import TIME_PREFIX, ModelFlops
from huatuo_jax.training.update import Metrics

PREFIX = "ppo"
FIRST = "first_minibatch"
"""Gauges of the first minibatch of an update: there the policy is still the one that sampled."""

_OF_THE_FIRST = ("ratio", "clipped_low", "clipped_high", "approximate_kl_k3_per_token")
_COUNTERS = ("num_updates", "num_not_finite", "not_finite_in_a_row", "num_empty")
_NOT_SUMS = (*_COUNTERS, "grad_norm", "learning_rate")

Decode = Callable[[Sequence[int]], str]


class Spent:
    """Seconds of an iteration by what they were spent on."""

    def __init__(self) -> None:
        """Starts the clock of the whole."""
        self._began = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def on(self, what: str) -> Iterator[None]:
        """Counts the time inside; what is done there has to wait for the devices itself."""
        began = time.perf_counter()
        yield
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - began

    @property
    def whole(self) -> float:
        """Seconds since the start."""
        return max(time.perf_counter() - self._began, 1e-9)


@dataclasses.dataclass
class UpdateSums:
    """Metrics of the steps of an update.

    Attributes:
        policy: metrics of each of the policy's steps.
        value: of each of the critic's.
        stopped_early: whether the KL's bound ended the passes.
    """

    policy: list[Metrics] = dataclasses.field(default_factory=list)
    value: list[Metrics] = dataclasses.field(default_factory=list)
    stopped_early: bool = False

    def on_host(self) -> "UpdateSums":
        """Returns the same as numpy arrays; waits for them."""
        return UpdateSums(
            jax.device_get(self.policy), jax.device_get(self.value), self.stopped_early
        )


@dataclasses.dataclass(frozen=True)
class IterationFlops:
    """The floating-point operations of an iteration, by the formula of `training.metrics`.

    Sampling counts as a forward pass: with a cache it computes each token once.

    Attributes:
        policy: its parts of the formula.
        critic: of the critic; None without one.
        scorer: of the reward model; None where there is none.
    """

    policy: ModelFlops
    critic: ModelFlops | None
    scorer: ModelFlops | None

    def of(self, rollout: Rollout, *, policy_passes: float, critic_passes: float) -> float:
        """Counts one iteration, whose update made so many passes over the rollout."""
        lengths_N = rollout.rows["segment_ids"].sum(axis=1).astype(float)
        pairs, answered = (lengths_N * (lengths_N + 1) / 2).sum(), rollout.num_answer_tokens

        tokens = lengths_N.sum()

        def trained(model: ModelFlops, scored: float) -> float:
            return model.of_step(tokens=tokens, scored_tokens=scored, attended_pairs=pairs)

        def forward(model: ModelFlops, scored: float) -> float:
            return model.of_forward(tokens=tokens, scored_tokens=scored, attended_pairs=pairs)

        total = 3 * forward(self.policy, answered) + policy_passes * trained(self.policy, answered)
        if self.critic is not None:
            total += forward(self.critic, 0) + critic_passes * trained(self.critic, 0)
        if self.scorer is not None:
            total += forward(self.scorer, 0)
        return total


@dataclasses.dataclass(frozen=True, kw_only=True)
class IterationReport:
    """An iteration, as it is reported.

    Attributes:
        cfg: the run's settings.
        iteration: its number, from 1.
        kl_coef: its coefficient.
        rollout: what was sampled.
        rewards: of the answers, not scaled.
        num_prompts: that were asked, those of groups that were drawn anew among them.
        targets: on the host.
        update: on the host.
        spent: its time.
    """

    cfg: PpoConfig
    iteration: int
    kl_coef: float
    rollout: Rollout
    rewards: Rewards
    num_prompts: int
    targets: Targets
    update: UpdateSums
    spent: Spent

    def fields(self) -> dict[str, float]:
        """Returns the numbers for `metrics.jsonl`, those of the clock left aside."""
        fields = rollout_fields(self.targets.sums, prefix=PREFIX)
        fields |= {
            f"{PREFIX}/kl_coef": self.kl_coef,
            f"{PREFIX}/tokens": self.rollout.num_tokens,
            f"{PREFIX}/answer_tokens": self.rollout.num_answer_tokens,
            f"{PREFIX}/stopped_early": float(self.update.stopped_early),
        }
        if self.cfg.rollout.redraw_rounds:
            drawn_anew = self.num_prompts - len(self.rollout.prompts)
            fields[f"{PREFIX}/groups_drawn_anew"] = drawn_anew
        if self.rewards.terms:
            fields |= self.rewards.fields(prefix=PREFIX)
        if self.update.policy:
            total = _added(self.update.policy)
            fields |= policy_numbers(total, prefix=PREFIX)
            fields |= _step_fields(self.update.policy, total, "policy")
            if "ptx_loss" in total:
                tokens = max(float(total["ptx_tokens"]), 1.0)
                fields[f"{PREFIX}/ptx_loss"] = float(total["ptx_loss"]) / tokens
            first = policy_numbers(self.update.policy[0], prefix=f"{PREFIX}/{FIRST}")
            fields |= {
                name: first[name] for name in (f"{PREFIX}/{FIRST}/{n}" for n in _OF_THE_FIRST)
            }
        if self.update.value:
            total = _added(self.update.value)
            clipped = float(total["value_clipped"]) / max(float(total["tokens"]), 1.0)
            fields |= _step_fields(self.update.value, total, "value")
            fields[f"{PREFIX}/value_clipped"] = clipped
        return fields

    def speed(self, flops: IterationFlops, *, peak_flops: float | None) -> dict[str, float]:
        """Returns the numbers that depend on the clock.

        Args:
            flops: of the models.
            peak_flops: of all devices together in FLOPs per second; None where it is not known.
        """
        whole, parts = self.spent.whole, self.spent.seconds
        found = {f"{name}_s": seconds for name, seconds in parts.items()}
        found |= {
            "step_s": whole,
            "generation_share": parts["generation"] / whole,
            "tokens_per_s": self.rollout.num_tokens / whole,
            "generated_tokens_per_s": self.rollout.num_answer_tokens / parts["generation"],
        }
        if peak_flops is not None:
            number = self.cfg.num_minibatches
            done = flops.of(
                self.rollout,
                policy_passes=len(self.update.policy) / number,
                critic_passes=len(self.update.value) / number,
            )
            found["model_flops_utilisation"] = done / (whole * peak_flops)
        return {f"{TIME_PREFIX}{name}": value for name, value in found.items()}

    @property
    def not_finite_in_a_row(self) -> int:
        """Number of last steps that were skipped, of the model with more of them."""
        last = [steps[-1] for steps in (self.update.policy, self.update.value) if steps]
        return max((int(one["not_finite_in_a_row"]) for one in last), default=0)

    def samples(self, number: int, decode: Decode | None) -> list[dict[str, Any]]:
        """Answers from all over the rollout, with what became of them.

        Args:
            number: how many at most.
            decode: from tokens to text; None gives the tokens themselves.
        """
        show: Callable[[Sequence[int]], Any] = list if decode is None else decode
        rows = []
        answers = self.rollout.answers
        number = min(number, len(answers))
        for index in (place * len(answers) // number for place in range(number)):
            answer, prompt = answers[index], self.rollout.prompt_of(index)
            rows.append(
                {
                    "step": self.iteration,
                    "id": prompt.id,
                    "prompt": show(prompt.token_ids),
                    "answer": show(answer.token_ids),
                    "score": self._if_rewarded(index, self.rewards.scores_N),
                    "answer_score": self._if_rewarded(index, self.targets.scores_N),
                    "kl": _number(self.targets.kl_N[index]),
                    "length": len(answer.token_ids),
                    "prompt_token_ids": list(prompt.token_ids),
                    "token_ids": list(answer.token_ids),
                    "finish_reason": answer.finish_reason,
                }
                | self._terms(index)
            )
        return rows

    def _if_rewarded(self, index: int, values_N: npt.NDArray[Any]) -> float | None:
        return _number(values_N[index]) if self.rewards.has_reward_N[index] else None

    def _terms(self, index: int) -> dict[str, Any]:
        return {"rewards": self.rewards.shown(index)} if self.rewards.terms else {}


def _added(steps: Sequence[Metrics]) -> dict[str, np.ndarray]:
    """Adds up the sums of all steps, in float64."""
    names = [name for name in steps[0] if name not in _NOT_SUMS]
    return {name: np.sum([np.asarray(one[name], np.float64) for one in steps]) for name in names}


def _step_fields(
    steps: Sequence[Metrics], total: Mapping[str, np.ndarray], name: str
) -> dict[str, float]:
    last = steps[-1]
    norms = [float(one["grad_norm"]) for one in steps]
    return {
        f"{PREFIX}/{name}_loss": float(total["loss"]) / max(float(total["num_terms"]), 1.0),
        f"{PREFIX}/{name}_grad_norm": float(np.mean(norms)),
        f"{PREFIX}/{name}_learning_rate": float(last["learning_rate"]),
        f"{PREFIX}/{name}_updates": int(last["num_updates"]),
        f"{PREFIX}/{name}_steps_not_finite": int(last["num_not_finite"]),
    }


def _number(value: Any) -> float | None:
    """Returns a number for JSON; None for NaN and infinities, which it lacks."""
    return float(value) if np.isfinite(value) else None
