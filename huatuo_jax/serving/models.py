"""The served models: language models with their engines, and reward models."""

import dataclasses
import functools
import os
import pathlib
import secrets
import time
from collections.abc import Iterable, Sequence

import numpy as np

from huatuo_jax.api.in_use import Scorers, Settings, open_for_use
from huatuo_jax.api.models import RewardModel, open_reward_model
from huatuo_jax.backbone.config import ComputeConfig
from huatuo_jax.core.files import as_path, is_address
from huatuo_jax.data.python_data import as_prompt
from huatuo_jax.data.records import Messages
from huatuo_jax.generation.programs import PAGE_SIZE
from huatuo_jax.generation.requests import Request, SamplingConfig, slots_for
from huatuo_jax.generation.saved_model import SavedModel
from huatuo_jax.serving.bodies import ChatMessage, Sampling
from huatuo_jax.serving.errors import ApiError
from huatuo_jax.serving.runner import ServedEngine
from huatuo_jax.serving.tokens import Tokens, finite
from huatuo_jax.training.scoring import GivenAnswer, ScoredTokens

_SEEDS = 1 << 32
_BEST = (1, 5, 20)  # Numbers of best tokens that programs are compiled for.


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """The log-probabilities of a prompt's tokens after the first.

    Attributes:
        log_probs: of each given those before it, at temperature 1.
        best: for each place the best tokens with their log-probabilities.
    """

    log_probs: list[float]
    best: list[dict[int, float]]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ServedModel:
    """A model that is served.

    Attributes:
        name: its id.
        saved: with tokenizer and template.
        max_length: tokens of a prompt and an answer at most.
        created: time in seconds since 1970.
    """

    name: str
    saved: SavedModel
    max_length: int
    created: int

    def chat_prompt(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Returns the tokens of a conversation.

        Raises:
            ApiError: it is out of order, or the template cannot render it.
        """
        dialogue = dialogue_of(messages)
        try:
            return self.saved.template.prompt(dialogue, self.saved.tokenizer)
        except ValueError as error:
            raise ApiError(400, f"messages: {error}", param="messages") from error

    def text_prompt(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Returns the tokens of a text, in which names of special tokens are those tokens."""
        return list(
            self.saved.tokenizer.encode(text, add_special_tokens=add_special_tokens, verbose=False)
        )


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Policy(ServedModel):
    """A language model that is served.

    Attributes:
        compute: dtype and kernels.
        sampling: its own, for fields that a request does not give.
        engine: that answers.
        tokens: texts and bytes of its tokens.
    """

    compute: ComputeConfig
    sampling: SamplingConfig
    engine: ServedEngine
    tokens: Tokens

    def requests(
        self, prompts: Sequence[Sequence[int]], body: Sampling, *, param: str, num_top: int = 0
    ) -> list[Request]:
        """Makes the requests of a body.

        Args:
            prompts: token ids.
            body: how they are answered.
            param: name of the field that the prompts come from.
            num_top: best tokens whose log-probabilities are given.

        Raises:
            ApiError: a prompt is empty or too long, or the engine cannot answer it.
        """
        sampling = self.saved.with_stops(body.sampling(self.sampling))
        seed = secrets.randbelow(_SEEDS) if body.seed is None else body.seed % _SEEDS
        self.check_lengths(prompts, param=param)
        found = []
        for prompt in prompts:
            request = Request(
                prompt_token_ids=prompt,
                sampling=sampling,
                seed=seed,
                num_answers=body.n,
                num_top_log_probs=num_top,
            )
            try:
                self.engine.engine.check(request)
            except ValueError as error:
                raise ApiError(400, f"{param}: {error}", param=param) from error
            found.append(request)
        return found

    def check_lengths(self, prompts: Sequence[Sequence[int]], *, param: str, room: int = 1) -> None:
        """Raises ApiError for a prompt without tokens, or with too many.

        Args:
            prompts: token ids.
            param: name of the field that they come from.
            room: tokens of an answer that have to fit behind each.
        """
        most = self.max_length - room
        for number, prompt in enumerate(prompts):
            name = f"{param}[{number}]" if len(prompts) > 1 else param
            if not prompt:
                raise ApiError(400, f"{name}: has no tokens", param=param)
            if len(prompt) > most:
                answer = ", so that an answer of one token fits" if room else ""
                raise ApiError(
                    400,
                    f"{name}: {len(prompt)} tokens, {len(prompt) - most} more than the {most} that "
                    f"it may have{answer}",
                    param=param,
                    code="context_length_exceeded",
                )

    @functools.cached_property
    def _scorers(self) -> Scorers:
        # Read once more, when first needed: the engine holds them in a form of its own.
        params = self.saved.load_params()
        return Scorers(self.saved, self.compute, params, max_length=self.max_length)

    def score(self, prompts: Sequence[Sequence[int]], num_top: int) -> list[Scores]:
        """Computes log-probabilities of prompts; it runs in the runner's thread.

        Args:
            prompts: token ids.
            num_top: best tokens to give, at most the last of `_BEST`.
        """
        count = next(one for one in _BEST if one >= num_top)
        given = [
            GivenAnswer(np.asarray(one, np.int32), prompt_length=1)
            for one in prompts
            if len(one) > 1
        ]
        scored = iter(
            self._scorers.of(len(given)).top_log_probs(given, count=count) if given else ()
        )
        return [
            _scores(next(scored), num_top) if len(one) > 1 else Scores([], []) for one in prompts
        ]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Reward(ServedModel):
    """A reward model that is served.

    Attributes:
        model: that scores.
    """

    model: RewardModel


class Served:
    """All models of a server, by their ids."""

    def __init__(self, policies: Sequence[Policy], rewards: Sequence[Reward]) -> None:
        """Takes the models.

        Args:
            policies: language models.
            rewards: reward models.
        """
        self.policies = {one.name: one for one in policies}
        self.rewards = {one.name: one for one in rewards}

    def policy(self, name: str) -> Policy:
        """Returns a language model; raises ApiError for another name."""
        if name not in self.policies:
            other = " (a reward model, for /v1/classify)" if name in self.rewards else ""
            raise _unknown(name, self.policies, other)
        return self.policies[name]

    def reward(self, name: str) -> Reward:
        """Returns a reward model; raises ApiError for another name."""
        if name not in self.rewards:
            other = " (not a reward model)" if name in self.policies else ""
            raise _unknown(name, self.rewards, other)
        return self.rewards[name]

    def any(self, name: str | None) -> Policy | Reward:
        """Returns a model of either kind, the first for None; raises ApiError for another name."""
        both: dict[str, Policy | Reward] = {**self.policies, **self.rewards}
        if name is None:
            return next(iter(both.values()))
        if name not in both:
            raise _unknown(name, both)
        return both[name]


def _scores(scored: ScoredTokens, num_top: int) -> Scores:
    best = [
        {token: finite(value) for token, value in zip(ids[:num_top], values, strict=False)}
        for ids, values in zip(
            scored.token_ids.tolist(), scored.top_log_probs.tolist(), strict=True
        )
    ]
    return Scores([finite(one) for one in scored.log_probs.tolist()], best)


def _unknown(name: str, known: Iterable[str], more: str = "") -> ApiError:
    there = ", ".join(known) or "none of this kind"
    return ApiError(
        404,
        f"model: {name[:200]!r} is not served here{more}; there is {there}",
        param="model",
        code="model_not_found",
    )


def dialogue_of(messages: Sequence[ChatMessage]) -> Messages:
    """Returns a conversation that ends with the user.

    Raises:
        ApiError: an unknown role, or roles out of order.
    """
    turns = [one.turn() for one in messages]
    try:
        return as_prompt(turns, name="messages").messages
    except ValueError as error:
        raise ApiError(400, str(error), param="messages") from error


def named(sources: Sequence[str]) -> dict[str, str]:
    """Returns sources by the ids of their models.

    `NAME=SOURCE` names one; another has the last part of its path, or as many as tell it from the
    others.

    Raises:
        ValueError: two have one name.
    """
    given = [
        source.partition("=")[::2] if _has_name(source) else ("", source) for source in sources
    ]
    parts = [pathlib.PurePath(os.path.normpath(source)).parts for _, source in given]
    found: dict[str, str] = {}
    for (name, source), own in zip(given, parts, strict=True):
        for length in range(1, len(own) + 1):
            if name:
                break
            short = own[-length:]
            if length == len(own) or [one[-length:] for one in parts].count(short) == 1:
                name = "/".join(short).replace("//", "/")
        if name in found:
            raise ValueError(f"two models are named {name!r}; name one by NAME=DIR")
        found[name] = source
    return found


def _has_name(source: str) -> bool:
    name, _, place = source.partition("=")
    is_named_address = is_address(place) and not is_address(name)
    return bool(place) and (is_named_address or not as_path(source).exists())


def load_policy(
    name: str, source: str, settings: Settings, *, slots: int, prefix_cache_tokens: int
) -> Policy:
    """Loads a language model and makes its engine, which answers once before it is served.

    Args:
        name: its id.
        source: a folder of either form, or a hub id.
        settings: of its loading.
        slots: answers decoded at once; as many more as the mesh needs.
        prefix_cache_tokens: of earlier prompts and answers to keep, likewise; 0 for none.

    Raises:
        ValueError: no such model, or an invalid setting.
        OSError: its weights cannot be read.
    """
    saved, compute, max_length = open_for_use(source, "lm", settings)
    own = saved.default_sampling()
    slots = slots_for(slots, saved.mesh)
    pages = -(-prefix_cache_tokens // PAGE_SIZE)
    made = saved.make_engine(
        saved.load_params(),
        compute,
        slots=slots,
        max_length=max_length,
        prefix_cache_pages=slots_for(pages, saved.mesh),
    )
    engine = ServedEngine(made, slots=slots)
    engine.probe()
    return Policy(
        name=name,
        saved=saved,
        compute=compute,
        max_length=max_length,
        sampling=own,
        engine=engine,
        tokens=Tokens(saved.tokenizer),
        created=int(time.time()),
    )


def load_reward(name: str, source: str, settings: Settings) -> Reward:
    """Loads a reward model.

    Raises:
        ValueError: no such model, or an invalid setting.
        OSError: its weights cannot be read.
    """
    model = open_reward_model(source, settings)
    _ = model.params  # Read now, so that broken weights fail here.
    return Reward(
        name=name,
        saved=model.saved,
        max_length=model.max_length,
        created=int(time.time()),
        model=model,
    )


def load(
    models: Sequence[str],
    reward_models: Sequence[str],
    settings: Settings,
    *,
    slots: int,
    prefix_cache_tokens: int = 0,
) -> Served:
    """Loads all models.

    Args:
        models: language models by their sources, see `named`.
        reward_models: reward models likewise.
        settings: of their loading.
        slots: answers that a model writes at once.
        prefix_cache_tokens: of earlier prompts and answers that a model keeps; 0 for none.

    Raises:
        ValueError: no such model, or an invalid setting.
        OSError: weights cannot be read.
    """
    sources = list(named([*models, *reward_models]).items())
    return Served(
        [
            load_policy(*one, settings, slots=slots, prefix_cache_tokens=prefix_cache_tokens)
            for one in sources[: len(models)]
        ],
        [load_reward(*one, settings) for one in sources[len(models) :]],
    )
