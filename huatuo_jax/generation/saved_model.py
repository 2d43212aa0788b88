"""A model on disk with its tokenizer and chat template, opened before its weights are read.

Everything here is known without the weights, so that a user's errors are raised before reading
them. `Engines` answers requests of any size with few compiled programs.
"""

import dataclasses
from collections.abc import Collection, Generator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import transformers
from jax.sharding import Mesh

from huatuo_jax.backbone.config import ComputeConfig
from huatuo_jax.backbone.transformer import Head, Transformer
from huatuo_jax.checkpoint import models
from huatuo_jax.core import sharding
from huatuo_jax.core.sharding import MeshConfig
from huatuo_jax.data.chat import templates
from huatuo_jax.data.chat.template import ChatTemplate
from huatuo_jax.generation import weights
from huatuo_jax.generation.buckets import bucket_of, row_lengths
from huatuo_jax.generation.engine import Engine
from huatuo_jax.generation.requests import Answer, Request, Running, SamplingConfig, slots_for
from huatuo_jax.hf import generation_config
from huatuo_jax.hf.config import read_json
from huatuo_jax.hf.tokenizer import check_fits, load_tokenizer

_OTHER_HEAD: Mapping[Head, str] = {
    "lm": "this model scores; generation needs one with a token head",
    "score": "this model has a token head; scoring needs a reward model (ours, or "
    "ForSequenceClassification with one label)",
}
# Fields of a generation_config.json that have the name and meaning of ours.
_WITHOUT_SAMPLING = ("max_new_tokens", "min_new_tokens", "repetition_penalty")
_SAMPLING = (*_WITHOUT_SAMPLING, "temperature", "top_k", "top_p", "min_p")
_TOP_K = 50  # The default of transformers where it samples.
_SLOTS = (1, 4, 16)


@dataclasses.dataclass(frozen=True)
class SavedModel:
    """A model on disk; `load_params` reads its weights.

    Attributes:
        info: the content of its folder.
        mesh: devices of its weights and computation.
        tokenizer: its own.
        template: the chat template of its dialogues.
        stop_token_ids: tokens that end an answer; empty for a model without a token head.
    """

    info: models.ModelInfo
    mesh: Mesh
    tokenizer: transformers.PreTrainedTokenizerBase
    template: ChatTemplate
    stop_token_ids: tuple[int, ...]

    def load_params(self) -> dict[str, Any]:
        """Loads the parameters onto the mesh, in their stored dtype."""
        return models.load_params(self.info, mesh=self.mesh)

    def with_stops(self, sampling: SamplingConfig) -> SamplingConfig:
        """Returns the sampling with the model's stop tokens added to its own."""
        stops = dict.fromkeys(self.stop_token_ids + sampling.stop_token_ids)
        return dataclasses.replace(sampling, stop_token_ids=tuple(stops))

    def default_sampling(self) -> SamplingConfig:
        """Returns the sampling of the model's `generation_config.json`, or greedy without one.

        Missing fields have the defaults of transformers' `generate`, which is greedy unless
        `do_sample` is true, except `max_new_tokens`, which has ours.

        Raises:
            ValueError: a field is invalid.
        """
        path = self.info.folder / generation_config.GENERATION_CONFIG_FILE
        found = read_json(path) if path.is_file() else {}
        told = {name: found[name] for name in _SAMPLING if found.get(name) is not None}
        if found.get("do_sample"):
            told = {"top_k": _TOP_K} | told
        else:
            told = {name: told[name] for name in _WITHOUT_SAMPLING if name in told}
            told["temperature"] = 0.0
        for name, value in told.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{path}: {name}={value!r} must be a number")
        try:
            return SamplingConfig(**told)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def make_engine(
        self,
        params: dict[str, Any],
        compute: ComputeConfig,
        *,
        slots: int,
        max_length: int,
        prefix_cache_pages: int = 0,
    ) -> Engine:
        """Makes an engine with these parameters of the model; sizes as in `Engine`."""
        return Engine(
            Transformer(self.info.cfg, compute),
            {"params": params},
            slots=slots,
            max_length=max_length,
            mesh=self.mesh,
            tokenizer=self.tokenizer,
            prefix_cache_pages=prefix_cache_pages,
        )


def open_saved_model(
    source: str,
    *,
    head: Head,
    template: str | None = None,
    default_system: str | None = None,
    template_date: str | None = None,
    mesh: MeshConfig,
    ignore_config_fields: Collection[str] = (),
) -> SavedModel:
    """Finds a model with its tokenizer and template, without reading its weights.

    Args:
        source: folder of either form, or a hub id.
        head: the head it must have: `lm` to answer, `score` for a reward model.
        template: chat template by name; None for the model's own, see `templates.for_tokenizer`.
        default_system: its system text; None for the template's own.
        template_date: the date that a tokenizer's own template prints, see `templates.by_name`.
        mesh: axes of the device mesh.
        ignore_config_fields: of its `config.json`, see `models.find_model`.

    Raises:
        ValueError: it has another head, its tokenizer or template does not fit it, or the mesh does
            not divide it.
        FileNotFoundError: there is no such model.
    """
    info = models.find_model(source, ignore_config_fields=ignore_config_fields)
    if info.head != head:
        raise ValueError(f"{source}: {_OTHER_HEAD[head]}")
    placed = weights.mesh_for(info.cfg, mesh, sharding.make_mesh(), field="mesh")
    tokenizer = load_tokenizer(info.folder)
    chosen = templates.for_tokenizer(
        tokenizer, template, default_system=default_system, date=template_date
    )
    name = f"{source}: the tokenizer"
    check_fits(tokenizer, info.cfg.vocab_size, name=name)
    chosen.check_fits(tokenizer, info.cfg.vocab_size, name=name)
    stops: tuple[int, ...] = ()
    if head == "lm":
        stops = generation_config.stop_token_ids(
            info.folder,
            tokenizer,
            of_template=chosen.stop_token_ids(tokenizer),
            vocab_size=info.cfg.vocab_size,
        )
    return SavedModel(info, placed, tokenizer, chosen, stops)


def compute_config(compute_dtype: str | None) -> ComputeConfig:
    """Returns the compute config of a model that is not trained."""
    default = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return ComputeConfig(compute_dtype=jnp.dtype(compute_dtype or default))


class Engines:
    """Answers requests with the smallest engine that is large enough.

    Sizes are steps of slots and of length, and each is compiled once. One engine at a time holds
    the model's weights.
    """

    def __init__(
        self,
        model: SavedModel,
        params: dict[str, Any],
        compute: ComputeConfig,
        *,
        max_slots: int,
        max_length: int,
    ) -> None:
        """Sets the sizes; nothing is compiled yet.

        Args:
            model: the model that answers.
            params: its own, on its mesh.
            compute: dtypes and kernels.
            max_slots: answers decoded at once at most.
            max_length: tokens of a prompt and an answer at most.
        """
        self._model, self._params, self._compute = model, params, compute
        self._lengths = row_lengths(max_length)
        self._slots = (*(one for one in _SLOTS if one < max_slots), max_slots)
        self._engines: dict[tuple[int, int], Engine] = {}
        self._loaded: tuple[int, int] | None = None

    def answer(self, requests: Sequence[Request]) -> list[list[Answer]]:
        """Answers requests, in the order of the requests and of their answers.

        Raises:
            ValueError: an invalid request, or a cache that does not fit.
        """
        if not requests:
            return []
        longest = max(len(one.prompt_token_ids) + one.sampling.max_new_tokens for one in requests)
        wanted = sum(one.num_answers for one in requests)
        slots = slots_for(bucket_of(wanted, self._slots), self._model.mesh)
        return self._engine(slots, bucket_of(longest, self._lengths)).generate_in_order(requests)

    def stream(self, request: Request) -> Generator[Running | Answer, None, None]:
        """Yields a request's answer as it grows, and last when it is complete.

        A caller that stops early, or an interrupt, drops the answer.

        Raises:
            ValueError: an invalid request, or a cache that does not fit.
        """
        assert request.num_answers == 1
        longest = len(request.prompt_token_ids) + request.sampling.max_new_tokens
        engine = self._engine(slots_for(1, self._model.mesh), bucket_of(longest, self._lengths))
        index = engine.submit(request)
        try:
            while True:
                finished = engine.step()
                yield from finished or engine.running
                if finished:
                    return
        finally:
            engine.abort(index)

    def _engine(self, slots: int, max_length: int) -> Engine:
        size = (slots, max_length)
        if size == self._loaded:
            return self._engines[size]
        if self._loaded is not None:
            self._engines[self._loaded].unload()
            self._loaded = None
        if size in self._engines:
            self._engines[size].load({"params": self._params})
        else:
            self._engines[size] = self._model.make_engine(
                self._params, self._compute, slots=slots, max_length=max_length
            )
        self._loaded = size
        return self._engines[size]
