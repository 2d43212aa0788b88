"""Models under evaluation: a saved one behind our engine, or one behind a server.

Both answer prompts by name and keep every response in a JSON Lines file. A run that is killed
resumes with the responses that are there; one to another prompt, or under other settings, is not
taken.
"""

import functools
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from huatuo_jax.backbone.transformer import Transformer
from huatuo_jax.checkpoint.models import fingerprint
from huatuo_jax.core.files import AppendedFile
from huatuo_jax.core.sharding import MeshConfig
from huatuo_jax.data.python_data import as_prompt
from huatuo_jax.evaluation.asking import Cost, ReplyFile, kept, read_kept
from huatuo_jax.evaluation.options import ROWS_AT_ONCE, Continuations, ContinuationScorer
from huatuo_jax.generation.prompts import PromptTooLong, Task, make_record, make_request, make_task
from huatuo_jax.generation.requests import SamplingConfig, slots_for
from huatuo_jax.generation.saved_model import Engines, compute_config, open_saved_model
from huatuo_jax.judge.chat import ChatModelConfig, ChatReply
from huatuo_jax.judge.judgements import sha256
from huatuo_jax.judge.server import key_from_environment

Dialogue = Sequence[Mapping[str, str]]
Progress = Callable[[int, int], None]

_CHUNK = 64
_SCORED_CHUNK = 512


@dataclass(frozen=True, kw_only=True)
class DecodingConfig:
    """The drawing of responses.

    Attributes:
        max_new_tokens: of a response.
        temperature: 0 takes the likeliest token each time.
        top_p: share of the probability that a token is drawn from; a server has its own.
        seed: of the draws; a server has its own.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


class Respondent(Protocol):
    """A model that answers prompts."""

    @property
    def name(self) -> str:
        """Its name in tables."""

    def settings(self) -> dict[str, Any]:
        """Returns the model and its decoding, as a figure's reader needs them."""

    def cost(self, prompts: Mapping[str, Dialogue], path: pathlib.Path) -> Cost | None:
        """Returns what the prompts without a response may take; None where nothing is paid."""

    def read(self, prompts: Mapping[str, Dialogue], path: pathlib.Path) -> dict[str, ChatReply]:
        """The responses that the file holds to these very prompts."""

    def release(self) -> None:
        """Lets go of the memory that responding took; it is taken again when needed."""

    def respond(
        self,
        prompts: Mapping[str, Dialogue],
        path: pathlib.Path,
        on_progress: Progress | None = None,
    ) -> dict[str, ChatReply]:
        """A response to each prompt, each kept in the file."""


class ServerRespondent:
    """A model behind an OpenAI-compatible server."""

    def __init__(
        self, cfg: ChatModelConfig, *, spending: str | os.PathLike[str] | None = None
    ) -> None:
        """Remembers whom to ask; nothing is sent.

        Args:
            cfg: the model; its `max_tokens` and `temperature` are those of the responses.
            spending: the spending file of all responses; None for one beside each file of them.
        """
        self._cfg, self._spending = cfg, spending

    @property
    def name(self) -> str:
        """The model's name on the server."""
        return self._cfg.model

    def settings(self) -> dict[str, Any]:
        """Server, model and decoding; the key is nowhere among them."""
        return {
            "model": self._cfg.model,
            "base_url": self._cfg.server.base_url,
            "max_tokens": self._cfg.max_tokens,
            "temperature": self._cfg.temperature,
        }

    def cost(self, prompts: Mapping[str, Dialogue], path: pathlib.Path) -> Cost:
        """Returns what the prompts without a response may take."""
        return ReplyFile(path, self._cfg).estimate(_as_messages(prompts))

    def read(self, prompts: Mapping[str, Dialogue], path: pathlib.Path) -> dict[str, ChatReply]:
        """Returns the responses that the file holds to these very prompts."""
        return ReplyFile(path, self._cfg).read(_as_messages(prompts))

    def release(self) -> None:
        """Does nothing: the model is the server's."""

    def respond(
        self,
        prompts: Mapping[str, Dialogue],
        path: pathlib.Path,
        on_progress: Progress | None = None,
    ) -> dict[str, ChatReply]:
        """Returns a response to each prompt; see `ReplyFile.ask`."""
        file = ReplyFile(path, self._cfg, key=key_from_environment(), spending=self._spending)
        return file.ask(_as_messages(prompts), on_progress)


class SavedRespondent:
    """A saved model behind our engine; its weights are read when they are first needed."""

    def __init__(
        self,
        source: str,
        decoding: DecodingConfig,
        *,
        name: str | None = None,
        template: str | None = None,
        default_system: str | None = None,
        mesh: MeshConfig | None = None,
        compute_dtype: str | None = None,
        slots: int = 32,
        max_length: int | None = None,
    ) -> None:
        """Finds the model and its tokenizer, not its weights.

        Args:
            source: a folder of ours, a Hugging Face folder, or a Hub id.
            decoding: how responses are drawn.
            name: in tables; None for the source.
            template: chat template; None for the model's own.
            default_system: its system text; None for the template's own.
            mesh: how the devices are divided.
            compute_dtype: None for float32 on CPU, else bfloat16.
            slots: responses under way at once, at most.
            max_length: tokens of prompt and response; None for the model's positions.

        Raises:
            FileNotFoundError: there is no such model.
            ValueError: the model or its template is not supported, or a field is invalid.
        """
        self._source, self._name = source, name or source
        self._saved = open_saved_model(
            source,
            head="lm",
            template=template,
            default_system=default_system,
            mesh=mesh or MeshConfig(),
        )
        self._decoding, self._compute = decoding, compute_config(compute_dtype)
        self._sampling = self._saved.with_stops(
            SamplingConfig(
                max_new_tokens=decoding.max_new_tokens,
                temperature=decoding.temperature,
                top_p=decoding.top_p,
            )
        )
        self._slots = slots
        positions = self._saved.info.cfg.max_positions
        self._max_length = min(max_length or positions, positions)
        self._params: dict[str, Any] | None = None
        self._engines: Engines | None = None
        self._scorer: ContinuationScorer | None = None

    @property
    def name(self) -> str:
        """Its name in tables."""
        return self._name

    def settings(self) -> dict[str, Any]:
        """Source, weights, template and decoding."""
        return {
            "model": self._source,
            "weights": self._weights,
            "template": repr(self._saved.template),
            "compute_dtype": str(self._compute.compute_dtype),
            "decoding": asdict(self._decoding),
        }

    def cost(self, prompts: Mapping[str, Dialogue], path: pathlib.Path) -> None:
        """Returns None: nothing is paid."""

    def read(self, prompts: Mapping[str, Dialogue], path: pathlib.Path) -> dict[str, ChatReply]:
        """Returns the responses that the file holds to these very prompts."""
        return read_kept(path, self._hashes(prompts))

    def release(self) -> None:
        """Lets go of weights and compiled programs."""
        self._params = self._engines = self._scorer = None

    def respond(
        self,
        prompts: Mapping[str, Dialogue],
        path: pathlib.Path,
        on_progress: Progress | None = None,
    ) -> dict[str, ChatReply]:
        """Returns a response to each prompt.

        A prompt that leaves no room for a response has none; its failure is `too long`.

        Raises:
            ValueError: another process writes the file, or a line of it is no response.
        """
        hashes = self._hashes(prompts)
        with AppendedFile(path, locked=True) as file:
            found = kept(file, hashes)
            file.cut_unfinished()
            left = [name for name in prompts if name not in found]
            for first in range(0, len(left), _CHUNK):
                names = left[first : first + _CHUNK]
                replies = self._answer({name: prompts[name] for name in names})
                file.append(
                    {"name": name, "request": hashes[name], **replies[name]._asdict()}
                    for name in names
                )
                found |= replies
                if on_progress is not None:
                    on_progress(len(found), len(prompts))
        return found

    def log_probs_in_file(
        self,
        asked: Mapping[str, tuple[str, Sequence[str]]],
        path: pathlib.Path,
        on_progress: Progress | None = None,
    ) -> dict[str, tuple[float, ...] | None]:
        """Returns `option_log_probs` by name, each kept in the file.

        A text that with a continuation is longer than the model's positions has None.

        Raises:
            ValueError: another process writes the file, or a line of it is broken.
        """
        settings = self.settings()
        settings.pop("decoding")
        hashes = {
            name: sha256(json.dumps([settings, context, list(ends)], sort_keys=True))
            for name, (context, ends) in asked.items()
        }
        found: dict[str, tuple[float, ...] | None] = {}
        with AppendedFile(path, locked=True) as file:
            for line in file.lines():
                name, values = line.row.get("name"), line.row.get("log_probs")
                if name in hashes and line.row.get("request") == hashes[name]:
                    found[name] = None if values is None else tuple(map(float, values))
            file.cut_unfinished()
            left = [name for name in asked if name not in found]
            for first in range(0, len(left), _SCORED_CHUNK):
                names = left[first : first + _SCORED_CHUNK]
                encoded = dict(
                    zip(names, self._encoded([asked[name] for name in names]), strict=True)
                )
                fitting = {name: one for name, one in encoded.items() if self._fits(one)}
                scores = dict(zip(fitting, self._scored(list(fitting.values())), strict=True))
                file.append(
                    {"name": name, "request": hashes[name], "log_probs": scores.get(name)}
                    for name in names
                )
                found |= {name: scores.get(name) for name in names}
                if on_progress is not None:
                    on_progress(len(found), len(asked))
        return found

    def option_log_probs(
        self,
        asked: Sequence[tuple[str, Sequence[str]]],
        on_progress: Progress | None = None,
    ) -> list[tuple[float, ...]]:
        """Returns the log-probability of each continuation of plain text, in nats.

        The tokens of a continuation are those that context and continuation have together behind
        those of the context alone, as lm-evaluation-harness has it.

        Args:
            asked: texts, each with its continuations.
            on_progress: is called with the contexts done and all of them.

        Raises:
            ValueError: a context with a continuation is longer than the model's positions.
        """
        return self._scored(self._encoded(asked), on_progress)

    def _scored(
        self, asked: Sequence[Continuations], on_progress: Progress | None = None
    ) -> list[tuple[float, ...]]:
        """The log-probabilities of each context's continuations."""
        if not asked:
            return []
        if self._scorer is None:
            self._scorer = ContinuationScorer(
                Transformer(self._saved.info.cfg, self._compute),
                {"params": self._loaded()},
                mesh=self._saved.mesh,
                rows_at_once=slots_for(ROWS_AT_ONCE, self._saved.mesh),
            )
        return self._scorer(asked, on_progress)

    def _encoded(self, asked: Sequence[tuple[str, Sequence[str]]]) -> list[Continuations]:
        """Tokens of texts and of their continuations, all texts at once."""
        # White space at a context's end belongs to the continuation's first token.
        texts = [
            text
            for context, ends in asked
            for text in (context.rstrip(), *(context + end for end in ends))
        ]
        ids = iter(self._saved.tokenizer(texts, verbose=False)["input_ids"] if texts else ())
        encoded = []
        for _, ends in asked:
            before = next(ids)
            encoded.append(Continuations(before, [next(ids)[len(before) :] for _ in ends]))
        return encoded

    def _fits(self, asked: Continuations) -> bool:
        """Tells whether a context with each continuation fits the model's positions."""
        longest = len(asked.context) + max(map(len, asked.continuations))
        return longest <= self._saved.info.cfg.max_positions

    def _hashes(self, prompts: Mapping[str, Dialogue]) -> dict[str, str]:
        """Returns a hash of each prompt under these settings, by its name."""
        settings = sha256(json.dumps(self.settings(), sort_keys=True, ensure_ascii=False))
        return {
            name: sha256(json.dumps([settings, [dict(one) for one in dialogue]]))
            for name, dialogue in prompts.items()
        }

    def _answer(self, prompts: Mapping[str, Dialogue]) -> dict[str, ChatReply]:
        """Responses to prompts, the ones that are too long named."""
        if self._engines is None:
            self._engines = Engines(
                self._saved,
                self._loaded(),
                self._compute,
                max_slots=self._slots,
                max_length=self._max_length,
            )
        tasks: dict[str, Task] = {}
        replies: dict[str, ChatReply] = {}
        for name, dialogue in prompts.items():
            try:
                tasks[name] = self._task(name, dialogue)
            except PromptTooLong as error:
                replies[name] = ChatReply(None, failure="too long", error=str(error))
        requests = [
            make_request(task, self._sampling, seed=self._decoding.seed, num_samples=1)
            for task in tasks.values()
        ]
        groups = self._engines.answer(requests)
        for (name, task), answers in zip(tasks.items(), groups, strict=True):
            record = make_record(task, answers, self._saved.template, self._saved.tokenizer)
            (fields,) = record["answers"]
            replies[name] = ChatReply(fields["text"], answers[0].finish_reason)
        return {name: replies[name] for name in prompts}

    def _task(self, name: str, dialogue: Dialogue) -> Task:
        prompt = as_prompt([dict(one) for one in dialogue], name=name)
        return make_task(
            replace(prompt, id=name),
            self._saved.template,
            self._saved.tokenizer,
            max_length=self._max_length,
            max_new_tokens=self._sampling.max_new_tokens,
            drop_oldest_turns=False,
        )

    @functools.cached_property
    def _weights(self) -> str:
        """The fingerprint of the model's files, taken once: every prompt's hash holds it."""
        return fingerprint(self._saved.info.folder)

    def _loaded(self) -> dict[str, Any]:
        if self._params is None:
            self._params = self._saved.load_params()
        return self._params


def _as_messages(prompts: Mapping[str, Dialogue]) -> dict[str, tuple[Mapping[str, str], ...]]:
    return {name: tuple(dialogue) for name, dialogue in prompts.items()}
