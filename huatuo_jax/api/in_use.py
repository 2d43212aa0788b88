"""Loaded models: the base class of policy and reward model, and the responses they exchange."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import transformers

from huatuo_jax.backbone.config import ComputeConfig
from huatuo_jax.backbone.transformer import Head, Transformer
from huatuo_jax.checkpoint.convert import write_model
from huatuo_jax.checkpoint.models import Form
from huatuo_jax.core.files import as_path
from huatuo_jax.core.sharding import MeshConfig
from huatuo_jax.data.accounting import TOO_LONG
from huatuo_jax.data.answers import Sampled, SampledPrompt
from huatuo_jax.data.chat.template import ChatTemplate
from huatuo_jax.data.python_data import DialogueLike, as_answer, as_prompt
from huatuo_jax.generation.buckets import ladder
from huatuo_jax.generation.requests import FinishReason, slots_for
from huatuo_jax.generation.saved_model import SavedModel, compute_config, open_saved_model
from huatuo_jax.hf.tokenizer import SideFiles
from huatuo_jax.preferences.data import AnswersTokenizer, AnswersToPrompt
from huatuo_jax.training.initial_model import talk_of
from huatuo_jax.training.scoring import GivenAnswer, Scorer

SaveFormat = Literal["hf", "orbax"]
_FORMS: dict[SaveFormat, Form] = {"hf": "hugging_face", "orbax": "orbax"}
_ROWS_AT_ONCE = 8  # Of a batch of responses; a single one takes a row a batch shard.
_SHORTEST_ROW = 64


@dataclasses.dataclass(frozen=True)
class Response:
    """A response of a model; `str` gives its text.

    Attributes:
        text: without what the template writes around it.
        token_ids: as sampled, the token that ended it included.
        log_probs: of each token, at the sampling temperature, nothing filtered or penalised.
        finish_reason: `stop` for a stop token or string, `length` for a limit.
        prompt_token_ids: of the dialogue before it.
        messages_dropped: number of the dialogue's oldest messages left out so that it fits.
    """

    text: str
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    finish_reason: FinishReason
    prompt_token_ids: tuple[int, ...]
    messages_dropped: int = 0

    def __str__(self) -> str:
        """Returns the text."""
        return self.text


class Delta(NamedTuple):
    """A piece of a response that is being written.

    Attributes:
        text: that follows the pieces before; it may be empty in the last one.
        finish_reason: of the last piece, see `Response`; None before.
    """

    text: str
    finish_reason: FinishReason | None = None


class LogProbs(NamedTuple):
    """The log-probabilities of a given response.

    Attributes:
        token_ids: of the response, `[T]`, the end of its turn included.
        log_probs: of each of them given those before it, `[T]` in float32.
    """

    token_ids: tuple[int, ...]
    log_probs: npt.NDArray[np.float32]


def given_answers(
    dialogues: Sequence[DialogueLike],
    responses: Sequence[str | Response],
    model: SavedModel,
    *,
    max_length: int,
    drop_oldest_turns: bool,
) -> list[GivenAnswer]:
    """Tokenizes responses to dialogues, by the rule of `huatuo_jax.data.answers`.

    Args:
        dialogues: one a response.
        responses: complete texts; or a model's responses, whose sampled tokens are used where they
            are of this model's tokenizer and template.
        model: that gives tokenizer and template.
        max_length: tokens of a dialogue and a response at most.
        drop_oldest_turns: leave out the oldest turns until both fit.

    Raises:
        ValueError: the lists differ in length, or a response has no token to score.
    """
    for name, given in (("dialogues", dialogues), ("responses", responses)):
        if isinstance(given, str) or not isinstance(given, Sequence):
            raise ValueError(f"{name} is a {type(given).__name__}; it should be a list of them")
    if len(dialogues) != len(responses):
        raise ValueError(
            f"{len(responses)} responses for {len(dialogues)} dialogues; each needs its own"
        )
    return [
        _given(
            dialogue,
            response,
            model,
            place=f"[{index}]" if len(dialogues) > 1 else "",
            max_length=max_length,
            drop_oldest_turns=drop_oldest_turns,
        )
        for index, (dialogue, response) in enumerate(zip(dialogues, responses, strict=True))
    ]


def _given(
    dialogue: DialogueLike,
    response: str | Response,
    model: SavedModel,
    *,
    place: str,
    max_length: int,
    drop_oldest_turns: bool,
) -> GivenAnswer:
    messages = as_prompt(dialogue, name=f"dialogue{place}").messages
    name, behind = f"response{place}", None
    if isinstance(response, Response):
        sampled = Sampled(response.token_ids, response.finish_reason)
        answer = as_answer(response.text, sampled, name=name)
        behind = SampledPrompt(response.prompt_token_ids, response.messages_dropped)
    else:
        answer = as_answer(response, name=name)
    tokenize = AnswersTokenizer(
        template=model.template,
        tokenizer=model.tokenizer,
        max_tokens=max_length,
        policy="drop_oldest_turns" if drop_oldest_turns else "drop_row",
    )
    (found,) = tokenize(AnswersToPrompt(messages, (answer,), behind))
    if found == TOO_LONG:
        advice = "" if drop_oldest_turns else "; drop_oldest_turns leaves out the oldest turns"
        raise ValueError(
            f"{name}: more than {max_length} tokens with its dialogue{advice or '; shorten it'}"
        )
    if isinstance(found, str):
        try:  # Once more, for the reason.
            model.template.render((*messages, *answer.messages), model.tokenizer)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        raise ValueError(f"{name}: it was cut off before its first token")
    return GivenAnswer(found.token_ids, int(np.argmax(found.is_answer)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings for loading a policy or a reward model.

    Attributes:
        template: chat template by name; None for the model's own, see `templates.for_tokenizer`.
        default_system: its system text; None for the template's own.
        template_date: the date that a tokenizer's own template prints, see `templates.by_name`.
        mesh: division of the devices; None for all of them along `fsdp`.
        compute_dtype: None for float32 on CPU, bfloat16 elsewhere.
        max_length: tokens of a dialogue and a response; None for the model's positions.
        ignore_config_fields: of its `config.json`, see `models.find_model`.
    """

    template: str | None = None
    default_system: str | None = None
    template_date: str | None = None
    mesh: MeshConfig | None = None
    compute_dtype: str | None = None
    max_length: int | None = None
    ignore_config_fields: Collection[str] = ()


class ModelInUse:
    """A model on disk; its weights are read when they are first needed."""

    def __init__(
        self,
        saved: SavedModel,
        compute: ComputeConfig,
        *,
        max_length: int,
        result: dict[str, Any] | None = None,
    ) -> None:
        """Reads no weights yet.

        Args:
            saved: the model.
            compute: dtype and kernels.
            max_length: tokens of a dialogue and a response.
            result: of the stage that trained it; None for a model that was loaded.
        """
        self._saved, self._compute = saved, compute
        self.max_length = max_length
        self.result = result

    @property
    def folder(self) -> pathlib.Path:
        """Returns the model's local folder."""
        return self._saved.info.folder

    @property
    def saved(self) -> SavedModel:
        """Returns the model on disk."""
        return self._saved

    @property
    def tokenizer(self) -> transformers.PreTrainedTokenizerBase:
        """Returns its tokenizer, of transformers."""
        return self._saved.tokenizer

    @property
    def template(self) -> ChatTemplate:
        """Returns the chat template that renders dialogues."""
        return self._saved.template

    @property
    def ignored_config_fields(self) -> tuple[str, ...]:
        """Returns the fields of its `config.json` that were to be ignored."""
        return self._saved.info.ignored_fields

    @functools.cached_property
    def params(self) -> dict[str, Any]:
        """Returns its parameters on the devices, in the dtype in which they are stored."""
        return self._saved.load_params()

    def save(
        self,
        target: str | os.PathLike[str],
        *,
        format: SaveFormat = "hf",
        overwrite: bool = False,
    ) -> None:
        """Writes the model with its tokenizer, chat template and stop tokens.

        A reward model's normalization is written beside it; transformers' scores are raw.

        Args:
            target: the folder to make.
            format: `hf` for transformers, vLLM and sglang, where a reward model is a sequence
                classifier; `orbax` for a folder of ours. The weights are the same, bit for bit.
            overwrite: replace a folder that is not empty.

        Raises:
            ValueError: an unknown format, or a family that Hugging Face's format cannot hold.
            FileExistsError: the folder is not empty and `overwrite` is not set.
            OSError: it cannot be written.
        """
        form = next((form for name, form in _FORMS.items() if name == format), None)
        if form is None:
            raise ValueError(f"format={format!r} must be one of {list(_FORMS)}")
        saved = self._saved
        side_files = SideFiles(
            model_folder=saved.info.folder,
            ignored_fields=saved.info.ignored_fields,
            talk=talk_of(
                saved.template,
                saved.tokenizer,
                # A reward model has none of its own: its dialogues end as the template's do.
                stop_token_ids=saved.stop_token_ids
                or tuple(saved.template.stop_token_ids(saved.tokenizer)),
                cfg=saved.info.cfg,
            ),
        )
        write_model(
            self.params,
            saved.info,
            as_path(target),
            form=form,
            side_files=side_files,
            overwrite=overwrite,
        )
        self._save_more(as_path(target))

    def _save_more(self, target: pathlib.Path) -> None:
        """Writes the files that only one kind of model has."""

    def _given(
        self,
        dialogues: Sequence[DialogueLike],
        responses: Sequence[str | Response],
        drop_oldest_turns: bool,
    ) -> list[GivenAnswer]:
        return given_answers(
            dialogues,
            responses,
            self._saved,
            max_length=self.max_length,
            drop_oldest_turns=drop_oldest_turns,
        )

    def _scorer(self, num_answers: int) -> Scorer:
        return self._scorers.of(num_answers)

    @functools.cached_property
    def _scorers(self) -> "Scorers":
        return Scorers(self._saved, self._compute, self.params, max_length=self.max_length)


class Scorers:
    """Scorers of a model for one response and for many; their few row lengths need few programs."""

    def __init__(
        self,
        saved: SavedModel,
        compute: ComputeConfig,
        params: Mapping[str, Any],
        *,
        max_length: int,
    ) -> None:
        """Compiles nothing yet.

        Args:
            saved: the model.
            compute: dtype and kernels.
            params: its own, on its mesh.
            max_length: tokens of a dialogue and a response at most.
        """
        self._saved, self._compute, self._params = saved, compute, params
        self._max_length = max_length
        self._scorers: dict[int, Scorer] = {}

    def of(self, num_answers: int) -> Scorer:
        """Returns the scorer for so many responses."""
        rows = slots_for(1 if num_answers == 1 else _ROWS_AT_ONCE, self._saved.mesh)
        if rows not in self._scorers:
            self._scorers[rows] = Scorer(
                Transformer(self._saved.info.cfg, self._compute),
                {"params": self._params},
                mesh=self._saved.mesh,
                rows_at_once=rows,
                row_length=ladder(min(_SHORTEST_ROW, self._max_length), self._max_length),
            )
        return self._scorers[rows]


def open_for_use(
    source: str | os.PathLike[str], head: Head, settings: Settings
) -> tuple[SavedModel, ComputeConfig, int]:
    """Returns a saved model, its compute config, and its limit of tokens.

    Raises:
        ValueError: no such model, one with another head, or an invalid setting.
    """
    try:
        saved = open_saved_model(
            os.fspath(source),
            head=head,
            template=settings.template,
            default_system=settings.default_system,
            template_date=settings.template_date,
            mesh=settings.mesh or MeshConfig(),
            ignore_config_fields=settings.ignore_config_fields,
        )
    except FileNotFoundError as error:
        raise ValueError(f"{source} is no model: {error}") from error
    backbone = saved.info.cfg
    rope, most = backbone.rope, backbone.max_positions
    if rope is not None and rope.rope_type == "dynamic":
        most = min(most, rope.original_max_positions or most)
    limit = settings.max_length or most
    if not 2 <= limit <= backbone.max_positions:
        raise ValueError(
            f"max_length={limit} must lie between 2 and the model's {backbone.max_positions} "
            "positions"
        )
    return saved, compute_config(settings.compute_dtype), limit
