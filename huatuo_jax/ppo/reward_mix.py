"""Rewards of responses: a scorer's alone, or a weighted sum of a reward model's and functions'."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from huatuo_jax.core import distributed
from huatuo_jax.generation.requests import Answer
from huatuo_jax.ppo.advantages import grpo_advantages
from huatuo_jax.ppo.prompts import Prompts, TokenPrompt
from huatuo_jax.ppo.reward_terms import LENGTH, RewardMixConfig, RewardTerm
from huatuo_jax.ppo.rollout import AnswerScorer, LengthScorer, Sampled, given_answers
from huatuo_jax.reward_functions import functions
from huatuo_jax.reward_functions.forms import final_part
from huatuo_jax.training.scoring import Normalization

Floats = npt.NDArray[np.float32]
Flags = npt.NDArray[np.bool_]

OF_RESPONSES = ("finish_reason", "num_tokens", "num_final_tokens", "token_ids")
"""Columns that come from the responses, beside those of the prompts' records."""


class Rewards(NamedTuple):
    """Rewards of responses, before they are scaled, clipped and penalised.

    Attributes:
        scores_N: 0 where there is none.
        has_reward_N: whether any term is a reward of the response.
        terms: by name, unweighted: values, and whether the term applies.
    """

    scores_N: Floats
    has_reward_N: Flags
    terms: Mapping[str, tuple[Floats, Flags]]

    def check(self, cfg: RewardMixConfig, *, iteration: int) -> None:
        """Raises ValueError where too many responses have no reward."""
        share = 1 - float(self.has_reward_N.mean())
        if share > cfg.most_without:
            each = ", ".join(
                f"{name} applies to {float(applies.mean()):.0%}"
                for name, (_, applies) in self.terms.items()
            )
            raise ValueError(
                f"iteration {iteration}: {share:.0%} of the responses have no reward, more than "
                f"config.ppo.reward.most_without={cfg.most_without:g} ({each})"
            )

    def fields(self, *, prefix: str) -> dict[str, float]:
        """Returns the mean of each term where it applies, and the shares where none does.

        Args:
            prefix: of the names.
        """
        found = {f"{prefix}/without_reward": 1 - float(self.has_reward_N.mean())}
        for name, (values_N, applies_N) in self.terms.items():
            mean = float(values_N[applies_N].mean(dtype=np.float64)) if applies_N.any() else np.nan
            found[f"{prefix}/reward/{name}"] = mean
            found[f"{prefix}/reward/{name}/without"] = 1 - float(applies_N.mean())
        return found

    def shown(self, index: int) -> dict[str, float | None]:
        """Returns the terms of a response; None where one does not apply."""
        return {
            name: float(values[index]) if applies[index] and np.isfinite(values[index]) else None
            for name, (values, applies) in self.terms.items()
        }


class RewardSource(Protocol):
    """Whatever gives responses their rewards."""

    def of(
        self,
        prompts: Sequence[TokenPrompt],
        answers: Sequence[Sampled | Answer],
        *,
        group: int | None,
    ) -> Rewards:
        """Rewards responses.

        Args:
            prompts: one for each response.
            answers: the responses.
            group: so many in a row are to one prompt and compared; None compares none.

        Raises:
            ValueError: a reward function failed.
        """


class ScorerRewards:
    """The scores of one scorer, which every response has."""

    def __init__(self, scorer: AnswerScorer) -> None:
        """Takes what scores."""
        self.scorer = scorer

    def of(
        self,
        prompts: Sequence[TokenPrompt],
        answers: Sequence[Sampled | Answer],
        *,
        group: int | None,
    ) -> Rewards:
        """Returns the scores, see `RewardSource`."""
        scores_N = np.asarray(self.scorer.scores(given_answers(prompts, answers)), np.float32)
        return Rewards(scores_N, np.ones(len(answers), bool), {})


class MixedRewards:
    """The weighted sum of terms, see `RewardMixConfig`."""

    def __init__(
        self,
        cfg: RewardMixConfig,
        *,
        scorer: AnswerScorer | None,
        normalization: Normalization | None,
        decode: Callable[[Sequence[int]], str],
        count_tokens: Callable[[str], int],
    ) -> None:
        """Finds the functions.

        Args:
            cfg: the terms.
            scorer: the reward model; None where no term needs it.
            normalization: of its scores; None for raw ones.
            decode: from tokens to text.
            count_tokens: of a text.

        Raises:
            ValueError: a function cannot be found.
        """
        self._cfg, self._scorer, self._normalization = cfg, scorer, normalization
        self._decode, self._count_tokens = decode, count_tokens
        self._calls = calls_of(cfg)

    def of(
        self,
        prompts: Sequence[TokenPrompt],
        answers: Sequence[Sampled | Answer],
        *,
        group: int | None,
    ) -> Rewards:
        """Returns the sums, see `RewardSource`."""
        found = self._called(prompts, answers)
        terms = {
            one.label: self._numbers(one, found.get(one.label), prompts, answers)
            for one in self._cfg.terms
        }
        return combined(self._cfg, terms, group=group)

    def _called(
        self, prompts: Sequence[TokenPrompt], answers: Sequence[Sampled | Answer]
    ) -> dict[str, list[float | None]]:
        """Calls the functions, in the first process, whose results all others get."""
        if not self._calls:
            return {}

        def call() -> list[list[float | None]]:
            asked = self._asked(prompts, answers)
            return functions.call_all(list(self._calls.values()), asked)

        found = distributed.told_by_first("rewards", call)
        return dict(zip(self._calls, found, strict=True))

    def _asked(
        self, prompts: Sequence[TokenPrompt], answers: Sequence[Sampled | Answer]
    ) -> functions.Asked:
        ids = [
            one.token_ids[:-1] if one.finish_reason == "stop" else one.token_ids for one in answers
        ]
        responses = [self._decode(one) for one in ids]
        finals = [final_part(text) for text in responses]
        columns = columns_of(prompts) | {
            "finish_reason": [one.finish_reason for one in answers],
            "num_tokens": [len(one.token_ids) for one in answers],
            "num_final_tokens": [self._count_tokens(text) for text in finals],
            "token_ids": [list(one.token_ids) for one in answers],
        }
        return functions.Asked([list(one.messages) for one in prompts], responses, columns)

    def _numbers(
        self,
        term: RewardTerm,
        found: Sequence[float | None] | None,
        prompts: Sequence[TokenPrompt],
        answers: Sequence[Sampled | Answer],
    ) -> tuple[Floats, Flags]:
        if found is not None:
            values_N = np.array([0.0 if one is None else one for one in found], np.float32)
            return values_N, np.array([one is not None for one in found])
        scorer = LengthScorer() if term.of == LENGTH else self._scorer
        assert scorer is not None
        scores_N = np.asarray(scorer.scores(given_answers(prompts, answers)), np.float32)
        if term.of != LENGTH and self._normalization is not None:
            scores_N = self._normalization.apply(scores_N).astype(np.float32)
        return scores_N, np.ones(len(answers), bool)


def combined(
    cfg: RewardMixConfig, terms: Mapping[str, tuple[Floats, Flags]], *, group: int | None
) -> Rewards:
    """Sums terms by their weights.

    Args:
        cfg: weights, and how they are combined.
        terms: values of each, and whether it applies.
        group: see `RewardSource.of`; without one, terms are summed as they are.
    """
    first, _ = next(iter(terms.values()))
    scores_N, has_reward_N = np.zeros(len(first), np.float32), np.zeros(len(first), bool)
    for one in cfg.terms:
        if not one.adjusts:
            has_reward_N |= terms[one.label][1]
    for one in cfg.terms:
        values_N, applies_N = terms[one.label]
        applies_N = applies_N & has_reward_N
        if cfg.combine == "sum_of_normalised" and group is not None:
            values_N = _normalised(values_N, applies_N, group)
        scores_N += np.float32(one.weight) * np.where(applies_N, values_N, np.float32(0))
    return Rewards(scores_N, has_reward_N, terms)


def calls_of(cfg: RewardMixConfig) -> dict[str, functions.Call]:
    """Finds the functions of a mix, by the names of their terms.

    Raises:
        ValueError: there is none of that name.
    """
    return {
        one.label: functions.Call(one.of, functions.find(one.of), one.settings)
        for one in cfg.terms
        if one.is_function
    }


def check_functions(cfg: RewardMixConfig, prompts: Prompts) -> dict[str, str]:
    """Checks that the prompts have what the functions need; returns a hash of each function.

    Raises:
        ValueError: a function that is not found, or needs what is not there.
    """
    calls = calls_of(cfg)
    columns = {*columns_of(prompts.items), *OF_RESPONSES}
    for call in calls.values():
        functions.check(call, columns)
    return {name: functions.identity_of(call.function) for name, call in calls.items()}


def columns_of(prompts: Sequence[TokenPrompt]) -> dict[str, list[Any]]:
    """Returns the fields of the prompts' records as columns, None where a record lacks one."""
    names = list(dict.fromkeys(name for one in prompts for name in one.columns))
    found = {name: [one.columns.get(name) for one in prompts] for name in names}
    return found | {"id": [one.id for one in prompts]}


def _normalised(values_N: Floats, applies_N: Flags, group: int) -> Floats:
    """Each value less the mean of its group, over the deviation there."""
    values_BG = jnp.asarray(values_N).reshape(-1, group)
    applies_BG = jnp.asarray(applies_N).reshape(-1, group)
    found_BG = grpo_advantages(values_BG, divide_by_deviation=True, applies_BG=applies_BG)
    return np.asarray(found_BG, np.float32).reshape(-1)
