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
from huatuo_jax.reward_functions.calling import Asked, RewardCalls, call_all
from huatuo_jax.reward_functions.forms import final_part
from huatuo_jax.reward_functions.graded import judged
from huatuo_jax.reward_functions.grader import Grader
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
        judge: what became of the questions to a judge, see `Grader.counts`; empty without one.
    """

    scores_N: Floats
    has_reward_N: Flags
    terms: Mapping[str, tuple[Floats, Flags]]
    judge: Mapping[str, int] = {}

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
        return found | {f"{prefix}/judge/{name}": count for name, count in self.judge.items()}

    def shown(self, index: int) -> dict[str, float | None]:
        """Returns the terms of a response; None where one does not apply."""
        return {
            name: float(values[index]) if applies[index] and np.isfinite(values[index]) else None
            for name, (values, applies) in self.terms.items()
        }


class RewardSource(Protocol):
    """Whatever gives responses their rewards."""

    @property
    def takes(self) -> bool:
        """Tells whether something is begun with a response before all others are there."""

    def begin(self, name: str) -> None:
        """Begins with other responses, under the name of their iteration."""

    def take(self, place: int, prompt: TokenPrompt, answer: Sampled | Answer) -> None:
        """Begins with a response that is finished.

        Args:
            place: among those that `of` will be called with.
            prompt: of the response.
            answer: the response.
        """

    def wait(self) -> None:
        """Waits for what was begun, all responses being finished.

        Raises:
            ValueError: as `of`.
        """

    def close(self) -> None:
        """Ends what runs in the background; nothing that is paid for is lost."""

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

    @property
    def takes(self) -> bool:
        """False: all responses are scored at once."""
        return False

    def begin(self, name: str) -> None:
        """Does nothing."""

    def take(self, place: int, prompt: TokenPrompt, answer: Sampled | Answer) -> None:
        """Does nothing."""

    def wait(self) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""

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
        services: Mapping[str, Any] | None = None,
    ) -> None:
        """Finds the functions.

        Args:
            cfg: the terms.
            scorer: the reward model; None where no term needs it.
            normalization: of its scores; None for raw ones.
            decode: from tokens to text.
            count_tokens: of a text.
            services: that functions ask, see `functions.SERVICES`; None for none. The grader is a
                working one in the first process alone.

        Raises:
            ValueError: a function cannot be found.
        """
        self._cfg, self._scorer, self._normalization = cfg, scorer, normalization
        self._decode, self._count_tokens = decode, count_tokens
        services = services or {}
        calls = calls_of(cfg, services)
        # A model of ours runs on the devices of all processes, which get the same of it.
        self._everywhere = {name: one for name, one in calls.items() if "verifier" in one.wants}
        self._by_first = {name: one for name, one in calls.items() if name not in self._everywhere}
        grader: Grader | None = services.get("grader")
        self._calls = RewardCalls(self._by_first, grader=grader)

    @property
    def takes(self) -> bool:
        """Tells whether a function is called for each response as it is finished."""
        return self._calls.takes

    def begin(self, name: str) -> None:
        """Begins with other responses, see `RewardSource`."""
        self._calls.begin(name)

    def take(self, place: int, prompt: TokenPrompt, answer: Sampled | Answer) -> None:
        """Begins with a response, in the first process."""
        if self.takes and distributed.is_first():
            self._calls.take(place, self._asked([prompt], [answer]))

    def wait(self) -> None:
        """Waits for what was begun."""
        distributed.by_first("rewards of single responses", self._calls.wait)

    def close(self) -> None:
        """Ends the functions' event loop, and waits for a judge's calls under way."""
        self._calls.close()

    def of(
        self,
        prompts: Sequence[TokenPrompt],
        answers: Sequence[Sampled | Answer],
        *,
        group: int | None,
    ) -> Rewards:
        """Returns the sums, see `RewardSource`."""
        found, judge = self._called(prompts, answers)
        terms = {
            one.label: self._numbers(one, found.get(one.label), prompts, answers)
            for one in self._cfg.terms
        }
        return combined(self._cfg, terms, group=group)._replace(judge=judge)

    def _called(
        self, prompts: Sequence[TokenPrompt], answers: Sequence[Sampled | Answer]
    ) -> tuple[dict[str, list[float | None]], dict[str, int]]:
        """Calls the functions, most in the first process alone, whose results all others get."""
        asked = self._asked(prompts, answers)
        found: dict[str, list[float | None]] = {}
        judge: dict[str, int] = {}
        if self._by_first:
            found, judge = distributed.told_by_first(
                "rewards", lambda: (self._calls.results(asked), self._calls.counts)
            )
        called = call_all(list(self._everywhere.values()), asked, self._calls.background)
        return found | dict(zip(self._everywhere, called, strict=True)), judge

    def _asked(self, prompts: Sequence[TokenPrompt], answers: Sequence[Sampled | Answer]) -> Asked:
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
        return Asked([list(one.messages) for one in prompts], responses, columns)

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


def calls_of(cfg: RewardMixConfig, services: Mapping[str, Any]) -> dict[str, functions.Call]:
    """Finds the functions of a mix, by the names of their terms.

    Args:
        cfg: the mix.
        services: that they may ask, by name.

    Raises:
        ValueError: there is none of that name.
    """
    return {
        one.label: functions.Call(one.of, functions.find(one.of), one.settings, services)
        for one in cfg.terms
        if one.is_function
    }


def check_functions(cfg: RewardMixConfig, prompts: Prompts) -> dict[str, str]:
    """Checks that the prompts have what the functions need; returns a hash of each function.

    Raises:
        ValueError: a function that is not found, needs what is not there, or cannot take a field
            of a prompt; or a grader or a verifier that no function asks.
    """
    fields = {"grader": cfg.grader, "verifier": cfg.verifier_model}
    calls = calls_of(cfg, {name: one for name, one in fields.items() if one is not None})
    columns = {*columns_of(prompts.items), *OF_RESPONSES}
    for call in calls.values():
        functions.check(call, columns)
        for prompt in prompts.items:
            functions.check_row(call, prompt.columns, name=prompt.id)
    functions.check_services(calls.values())
    if cfg.grader is not None and cfg.grader.judge.base_url is None:
        for call in calls.values():
            if "grader" in call.wants and call.function is not judged:
                raise ValueError(
                    f"{call.name}: asks questions, and the offline judge gives scores alone: set "
                    "config.ppo.reward.grader.judge.base_url to ask a model"
                )
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
