"""Answers to a few fixed prompts while a model trains, to read its progress."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import transformers
from jax.sharding import Mesh

from huatuo_jax.backbone.transformer import Transformer
from huatuo_jax.core import distributed
from huatuo_jax.core.files import AppendedFile, as_path, read_rows
from huatuo_jax.data.answers import text_of
from huatuo_jax.data.chat.template import ChatTemplate
from huatuo_jax.data.records import Message
from huatuo_jax.data.tokenizing import Example
from huatuo_jax.generation.engine import Engine
from huatuo_jax.generation.requests import Answer, Request, SamplingConfig, slots_for

_PROBE = (Message("user", "?"), Message("assistant", "!"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplesConfig:
    """The answers sampled at each evaluation.

    Attributes:
        num_prompts: held-out dialogues whose last answer is written anew; 0 for none.
        max_new_tokens: tokens of an answer at most.
    """

    num_prompts: int = 0
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        """Validates the fields."""
        if self.num_prompts < 0 or self.max_new_tokens < 1:
            raise ValueError(
                f"samples.num_prompts={self.num_prompts} must be at least 0, and "
                f"samples.max_new_tokens={self.max_new_tokens} at least 1"
            )


class SamplePrompt(NamedTuple):
    """A dialogue's beginning, and the answer in the data."""

    id: str
    token_ids: list[int]
    reference_ids: list[int]


class Samples:
    """Writes greedy answers to a file, one line for each prompt and step."""

    def __init__(
        self,
        model: Transformer,
        prompts: Sequence[SamplePrompt],
        tokenizer: transformers.PreTrainedTokenizerBase,
        *,
        stop_token_ids: Sequence[int],
        max_new_tokens: int,
        mesh: Mesh,
        path: str | os.PathLike[str],
    ) -> None:
        """Sets the sampling; nothing is compiled before the first `write`.

        Args:
            model: the backbone.
            prompts: at least one; those that leave no room for an answer are an error.
            tokenizer: the model's.
            stop_token_ids: the template's.
            max_new_tokens: tokens of an answer at most, and less where positions end.
            mesh: the weights' mesh.
            path: the file.
        """
        self._model, self._prompts, self._tokenizer = model, prompts, tokenizer
        self._mesh, self._path = mesh, as_path(path)
        longest = max(len(prompt.token_ids) for prompt in prompts)
        self._max_length = min(longest + max_new_tokens, model.cfg.max_positions)
        self._sampling = SamplingConfig(
            max_new_tokens=max_new_tokens, temperature=0.0, stop_token_ids=tuple(stop_token_ids)
        )
        self._engine: Engine | None = None

    def write(self, step: int, variables: Mapping[str, Any]) -> None:
        """Appends the answers of a step, after removing those of it and later ones.

        Those come from a killed run. All of several processes must call this; the first one writes.

        Args:
            step: optimizer steps so far.
            variables: the model's; released when the answers are written.
        """
        engine = self._load(dict(variables))
        requests = [
            Request(prompt_token_ids=prompt.token_ids, sampling=self._sampling)
            for prompt in self._prompts
        ]
        groups = engine.generate_in_order(requests)
        engine.unload()
        if distributed.is_first():
            self._add(step, groups)

    def _add(self, step: int, groups: Sequence[Sequence[Answer]]) -> None:
        rows = []
        for prompt, (answer,) in zip(self._prompts, groups, strict=True):
            rows.append(
                {
                    "step": step,
                    "id": prompt.id,
                    "prompt": self._tokenizer.decode(prompt.token_ids),
                    "answer": text_of(self._tokenizer, answer.token_ids),
                    "finish_reason": answer.finish_reason,
                    "reference": text_of(self._tokenizer, prompt.reference_ids),
                }
            )
        with AppendedFile(self._path, locked=False) as file:
            file.keep_while(lambda row: row["step"] < step)
            file.append(rows)

    def _load(self, variables: dict[str, Any]) -> Engine:
        if self._engine is not None:
            self._engine.load(variables)
            return self._engine
        self._engine = Engine(
            self._model,
            variables,
            slots=slots_for(len(self._prompts), self._mesh),
            max_length=self._max_length,
            mesh=self._mesh,
        )
        return self._engine


def read_samples(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Returns the rows of a samples file; none if there is no file yet."""
    path = as_path(path)
    if not path.exists():
        return []
    return read_rows(path, unfinished="skip")


def sample_prompt(
    example: Example, template: ChatTemplate, tokenizer: transformers.PreTrainedTokenizerBase
) -> SamplePrompt:
    """Cuts a tokenised dialogue before its last trained answer, whose header is kept.

    The ids are those of training; the header is the end of the template's prompt, where the
    template trains it with the answer.
    """
    trained = np.asarray(example.trained_mask)
    starts = np.flatnonzero(trained & ~np.concatenate([[False], trained[:-1]]))
    start = int(starts[-1])
    rendered = template.render(_PROBE, tokenizer)
    header = template.prompt(_PROBE[:1], tokenizer)[rendered.trained_mask.index(True) :]
    end = start + len(header)
    ids = np.asarray(example.token_ids).tolist()
    assert ids[start:end] == header, f"example {example.id!r} is of another template"
    # Turns that are not trained may follow it.
    answer_end = start + int(np.argmin(np.append(trained[start:], False)))
    return SamplePrompt(example.id, ids[:end], ids[end:answer_end])
