"""Language models and reward models, loaded from disk to generate and to score.

model = load_model("runs/demo/ppo/model")
print(model.chat("头痛三天了，怎么办？"))
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Collection, Generator, Sequence
from typing import Any, TypedDict, Unpack

from huatuo_jax.api.in_use import (
    Delta,
    LogProbs,
    ModelInUse,
    Response,
    Settings,
    open_for_use,
)
from huatuo_jax.backbone.config import ComputeConfig
from huatuo_jax.core.sharding import MeshConfig
from huatuo_jax.data.python_data import DialogueLike, as_prompt, as_prompts, prompt_of
from huatuo_jax.data.records import Message, Messages, Prompt, is_empty
from huatuo_jax.generation.prompts import Task, make_record, make_request, make_task
from huatuo_jax.generation.requests import Answer, SamplingConfig
from huatuo_jax.generation.saved_model import Engines, SavedModel
from huatuo_jax.generation.streaming import GrowingAnswer
from huatuo_jax.reward.export import carry_normalization
from huatuo_jax.training.scoring import Normalization, load_normalization


class SamplingFields(TypedDict, total=False):
    """The fields of `huatuo_jax.generation.requests.SamplingConfig`."""

    max_new_tokens: int
    min_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    stop_token_ids: tuple[int, ...]
    stop_strings: tuple[str, ...]


class LoadFields(TypedDict, total=False):
    """Settings for loading a model, see `huatuo_jax.api.in_use.Settings`.

    Attributes:
        template: chat template by name; None for the model's own where it has one, else
            HuatuoGPT's.
        default_system: its system text; None for the template's own.
        template_date: the date that a tokenizer's own template prints, as 2024-07-26.
        mesh: division of the devices; None for all of them along `fsdp`.
        compute_dtype: None for float32 on CPU, bfloat16 elsewhere.
        max_length: tokens of a dialogue and a response; None for the model's positions.
        ignore_config_fields: of its `config.json`: unknown ones that change nothing.
    """

    template: str | None
    default_system: str | None
    template_date: str | None
    mesh: MeshConfig | None
    compute_dtype: str | None
    max_length: int | None
    ignore_config_fields: Collection[str]


class Model(ModelInUse):
    """A language model with its tokenizer and chat template; see `load_model`.

    Attributes:
        max_length: tokens of a dialogue and a response at most.
        result: of the stage that trained it; None for a model that was loaded.
    """

    def __init__(
        self,
        saved: SavedModel,
        compute: ComputeConfig,
        *,
        max_length: int,
        max_slots: int,
        result: dict[str, Any] | None = None,
    ) -> None:
        """Is called by `load_model` and by the stages."""
        super().__init__(saved, compute, max_length=max_length, result=result)
        self._max_slots = max_slots

    def chat(
        self,
        dialogue: DialogueLike,
        *,
        seed: int = 0,
        drop_oldest_turns: bool = False,
        **sampling: Unpack[SamplingFields],
    ) -> str:
        """Returns a response to one dialogue, as text.

        It is sampled as the model's `generation_config.json` says, and greedily without one.

        Args:
            dialogue: the user's message; or messages with role and content, the user's last.
            seed: with the dialogue it decides the response, where that is sampled.
            drop_oldest_turns: leave out the oldest turns of a dialogue that is too long.
            **sampling: fields of `SamplingConfig` in place of the model's own.

        Raises:
            ValueError: the dialogue is empty, out of order or too long, or a field is invalid.
        """
        prompt = as_prompt(dialogue)
        how = self._default_sampling(sampling)
        return self._answer(prompt, how, seed=seed, drop_oldest_turns=drop_oldest_turns)

    def stream(
        self,
        dialogue: DialogueLike,
        *,
        seed: int = 0,
        drop_oldest_turns: bool = False,
        **sampling: Unpack[SamplingFields],
    ) -> Generator[Delta, None, None]:
        """Yields the response of `chat` in pieces, as it is written.

        A caller that stops early drops the rest; no other response may be asked for before.

        Args:
            dialogue: as for `chat`.
            seed: as for `chat`.
            drop_oldest_turns: as for `chat`.
            **sampling: as for `chat`.

        Raises:
            ValueError: as for `chat`, at the first piece.
        """
        how = self._saved.with_stops(self._default_sampling(sampling))
        task = self._task("dialogue", as_prompt(dialogue), how, drop_oldest_turns)
        request = make_request(task, how, seed=seed, num_samples=1)
        growing = GrowingAnswer(self.template, self.tokenizer, how.stop_strings)
        with contextlib.closing(self._engines.stream(request)) as answers:
            for answer in answers:
                if isinstance(answer, Answer):
                    (response,) = self._responses(task, [answer])
                    yield Delta(growing.finish(response.text), response.finish_reason)
                elif piece := growing.grow(answer.token_ids):
                    yield Delta(piece)

    def start_chat(
        self,
        *,
        system: str | None = None,
        seed: int = 0,
        drop_oldest_turns: bool = False,
        **sampling: Unpack[SamplingFields],
    ) -> "Chat":
        """Starts a conversation that keeps its turns.

        Args:
            system: its system text; None for the template's default.
            seed: as for `chat`.
            drop_oldest_turns: as for `chat`.
            **sampling: as for `chat`.

        Raises:
            ValueError: the system text is empty, or a field is invalid.
        """
        how = self._default_sampling(sampling)
        opening = () if system is None else (Message("system", system),)
        if system is not None and is_empty(system):
            raise ValueError("system is empty; None takes the template's default")

        def answer(messages: Messages) -> str:
            prompt = prompt_of(messages)
            return self._answer(prompt, how, seed=seed, drop_oldest_turns=drop_oldest_turns)

        return Chat(opening, answer)

    def generate(
        self,
        dialogues: Sequence[DialogueLike],
        *,
        num_samples: int = 1,
        seed: int = 0,
        drop_oldest_turns: bool = False,
        **sampling: Unpack[SamplingFields],
    ) -> list[list[Response]]:
        """Samples several responses to each of several dialogues.

        They are those that `launch/generate.py` gives for the same ids, seed and settings, whose
        defaults they have: temperature 1 and no filter. A dialogue without an id has one that
        follows from its text.

        Args:
            dialogues: each as for `chat`, or a row with `id` and `messages`.
            num_samples: responses to each.
            seed: with a dialogue's id it decides that dialogue's responses.
            drop_oldest_turns: as for `chat`.
            **sampling: fields of `SamplingConfig`.

        Raises:
            ValueError: as for `chat`; names the dialogue by its index.
        """
        prompts = as_prompts(dialogues, name="dialogues")
        return self._respond(
            [(f"dialogues[{index}]", one) for index, one in enumerate(prompts)],
            SamplingConfig(**sampling),
            num_samples=num_samples,
            seed=seed,
            drop_oldest_turns=drop_oldest_turns,
        )

    def log_probs(
        self,
        dialogue: DialogueLike,
        response: str | Response,
        *,
        temperature: float = 1.0,
        drop_oldest_turns: bool = False,
    ) -> LogProbs:
        """Returns the log-probability of each token of a response, given the dialogue.

        Args:
            dialogue: as for `chat`.
            response: its text, which the template's end of turn follows; or one that `generate`
                gave, as it was sampled.
            temperature: divides the logits.
            drop_oldest_turns: as for `chat`.

        Raises:
            ValueError: as for `chat`.
        """
        (found,) = self.log_probs_batch(
            [dialogue], [response], temperature=temperature, drop_oldest_turns=drop_oldest_turns
        )
        return found

    def log_probs_batch(
        self,
        dialogues: Sequence[DialogueLike],
        responses: Sequence[str | Response],
        *,
        temperature: float = 1.0,
        drop_oldest_turns: bool = False,
    ) -> list[LogProbs]:
        """Returns `log_probs` of several responses, each to its own dialogue."""
        given = self._given(dialogues, responses, drop_oldest_turns)
        if not given:
            return []
        found = self._scorer(len(given)).log_probs(given, temperature=temperature)
        return [
            LogProbs(tuple(one.token_ids[one.prompt_length :].tolist()), log_probs)
            for one, log_probs in zip(given, found, strict=True)
        ]

    @functools.cached_property
    def _engines(self) -> Engines:
        return Engines(
            self._saved,
            self.params,
            self._compute,
            max_slots=self._max_slots,
            max_length=self.max_length,
        )

    def _default_sampling(self, changed: SamplingFields) -> SamplingConfig:
        return dataclasses.replace(self._saved.default_sampling(), **changed)

    def _answer(
        self, prompt: Prompt, sampling: SamplingConfig, *, seed: int, drop_oldest_turns: bool
    ) -> str:
        """Returns the text of one response to one dialogue."""
        ((response,),) = self._respond(
            [("dialogue", prompt)],
            sampling,
            num_samples=1,
            seed=seed,
            drop_oldest_turns=drop_oldest_turns,
        )
        return response.text

    def _respond(
        self,
        prompts: Sequence[tuple[str, Prompt]],
        sampling: SamplingConfig,
        *,
        num_samples: int,
        seed: int,
        drop_oldest_turns: bool,
    ) -> list[list[Response]]:
        """Samples responses to prompts, each with its name for messages."""
        if num_samples < 1:
            raise ValueError(f"num_samples={num_samples} must be at least 1")
        sampling = self._saved.with_stops(sampling)
        tasks = [self._task(name, prompt, sampling, drop_oldest_turns) for name, prompt in prompts]
        requests = [
            make_request(task, sampling, seed=seed, num_samples=num_samples) for task in tasks
        ]
        groups = self._engines.answer(requests)
        return [self._responses(task, group) for task, group in zip(tasks, groups, strict=True)]

    def _task(
        self, name: str, prompt: Prompt, sampling: SamplingConfig, drop_oldest_turns: bool
    ) -> Task:
        try:
            return make_task(
                prompt,
                self.template,
                self.tokenizer,
                max_length=self.max_length,
                max_new_tokens=sampling.max_new_tokens,
                drop_oldest_turns=drop_oldest_turns,
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def _responses(self, task: Task, answers: Sequence[Answer]) -> list[Response]:
        record = make_record(task, answers, self.template, self.tokenizer)
        return [
            Response(
                text=fields["text"],
                token_ids=tuple(answer.token_ids),
                log_probs=tuple(answer.log_probs),
                finish_reason=answer.finish_reason,
                prompt_token_ids=tuple(task.token_ids),
                messages_dropped=task.messages_dropped,
            )
            for fields, answer in zip(record["answers"], answers, strict=True)
        ]


class Chat:
    """A conversation with a model; see `Model.start_chat`.

    Attributes:
        messages: all turns so far.
    """

    def __init__(self, opening: Messages, answer: Callable[[Messages], str]) -> None:
        """Is called by `Model.start_chat`.

        Args:
            opening: messages before the user's first one.
            answer: returns the response to a dialogue that ends with the user.
        """
        self.messages, self._answer = opening, answer

    def send(self, text: str) -> str:
        """Returns the response to the user's next message; both are kept, an empty response too.

        Raises:
            ValueError: as for `Model.chat`; the conversation stays as it was.
        """
        asked = (*self.messages, *as_prompt(text, name="text").messages)
        response = self._answer(asked)
        self.messages = (*asked, Message("assistant", response))
        return response


def load_model(
    source: str | os.PathLike[str],
    *,
    slots: int = 64,
    **settings: Unpack[LoadFields],
) -> Model:
    """Loads a language model from disk.

    Args:
        source: a folder of ours, a Hugging Face folder, or a hub id.
        slots: responses decoded at once at most.
        **settings: fields of `LoadFields`, such as `template` and `max_length`.

    Raises:
        ValueError: there is no such model, it is a reward model, the template does not suit its
            tokenizer, or the mesh does not divide it.
        OSError: its weights cannot be read.
    """
    model = open_policy(source, Settings(**settings), slots=slots)
    _ = model.params  # Read now, so that broken weights fail here.
    return model


def open_policy(
    source: str | os.PathLike[str],
    settings: Settings,
    *,
    slots: int = 64,
    result: dict[str, Any] | None = None,
) -> Model:
    """Opens a language model as `load_model` does; weights are read when they are first used."""
    if slots < 1:
        raise ValueError(f"slots={slots} must be at least 1")
    saved, compute, limit = open_for_use(source, "lm", settings)
    return Model(saved, compute, max_length=limit, max_slots=slots, result=result)


class RewardModel(ModelInUse):
    """A reward model with its tokenizer and chat template; see `load_reward_model`.

    Attributes:
        max_length: tokens of a dialogue and a response at most.
        normalization: mean and standard deviation that were stored with it; None where none were.
        result: of the stage that trained it; None for a model that was loaded.
    """

    def __init__(
        self,
        saved: SavedModel,
        compute: ComputeConfig,
        *,
        max_length: int,
        normalization: Normalization | None,
        result: dict[str, Any] | None = None,
    ) -> None:
        """Is called by `load_reward_model` and by `train_reward_model`."""
        super().__init__(saved, compute, max_length=max_length, result=result)
        self.normalization = normalization

    def score(
        self,
        dialogue: DialogueLike,
        response: str | Response,
        *,
        raw: bool = False,
        drop_oldest_turns: bool = False,
    ) -> float:
        """Scores a response; only scores of responses to the same dialogue are comparable.

        Args:
            dialogue: the user's message; or messages with role and content, the user's last.
            response: its text; or one that `Model.generate` gave.
            raw: as the model's head gives it; otherwise normalised, where a normalization is
                stored with the model.
            drop_oldest_turns: leave out the oldest turns of a dialogue that is too long.

        Raises:
            ValueError: the dialogue is empty, out of order or too long.
        """
        (found,) = self.score_batch(
            [dialogue], [response], raw=raw, drop_oldest_turns=drop_oldest_turns
        )
        return found

    def score_batch(
        self,
        dialogues: Sequence[DialogueLike],
        responses: Sequence[str | Response],
        *,
        raw: bool = False,
        drop_oldest_turns: bool = False,
    ) -> list[float]:
        """Scores several responses, each to its own dialogue."""
        given = self._given(dialogues, responses, drop_oldest_turns)
        if not given:
            return []
        found: list[float] = self._scorer(len(given)).scores(given).tolist()
        if raw or self.normalization is None:
            return found
        normalized: list[float] = self.normalization.apply(found).tolist()
        return normalized

    def count_tokens(
        self, dialogues: Sequence[DialogueLike], responses: Sequence[str | Response]
    ) -> int:
        """Returns the tokens of dialogues and responses; errors as of `score_batch`."""
        given = self._given(dialogues, responses, False)
        return sum(len(one.token_ids) for one in given)

    def _save_more(self, target: pathlib.Path) -> None:
        carry_normalization(self.folder, target, ignore_config_fields=self.ignored_config_fields)


def load_reward_model(
    source: str | os.PathLike[str], **settings: Unpack[LoadFields]
) -> RewardModel:
    """Loads a reward model from disk; arguments as for `load_model`.

    Raises:
        ValueError: there is no such model, it has a token head, the template does not suit its
            tokenizer, or the mesh does not divide it.
        OSError: its weights cannot be read.
    """
    model = open_reward_model(source, Settings(**settings))
    _ = model.params  # Read now, so that broken weights fail here.
    return model


def open_reward_model(
    source: str | os.PathLike[str], settings: Settings, *, result: dict[str, Any] | None = None
) -> RewardModel:
    """Opens a reward model; its weights are read when they are first used."""
    saved, compute, limit = open_for_use(source, "score", settings)
    return RewardModel(
        saved,
        compute,
        max_length=limit,
        normalization=load_normalization(saved.info.folder),
        result=result,
    )
