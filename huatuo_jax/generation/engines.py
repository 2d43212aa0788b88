"""Engines of a few sizes for one model, so that requests of any size compile few programs."""

from collections.abc import Sequence
from typing import Any

from huatuo_jax.backbone.config import ComputeConfig
from huatuo_jax.generation.buckets import bucket_of, row_lengths
from huatuo_jax.generation.engine import Engine
from huatuo_jax.generation.requests import Answer, Request
from huatuo_jax.generation.saved_model import SavedModel
from huatuo_jax.generation.slots import slots_for

_SLOTS = (1, 4, 16)


class Engines:
    """Answers requests with an engine of the smallest size that is large enough.

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
        """Nothing is compiled yet.

        Args:
            model: whose answers are wanted.
            params: its own, on its mesh.
            compute: how it is computed.
            max_slots: answers decoded at once at most.
            max_length: tokens of a prompt and an answer at most.
        """
        self._model, self._params, self._compute = model, params, compute
        self._lengths = row_lengths(max_length)
        self._slots = (*(one for one in _SLOTS if one < max_slots), max_slots)
        self._engines: dict[tuple[int, int], Engine] = {}
        self._loaded: tuple[int, int] | None = None

    def answer(self, requests: Sequence[Request]) -> list[list[Answer]]:
        """All answers of each request, in the order of the requests and of their answers.

        Raises:
            ValueError: an invalid request, or a cache that does not fit.
        """
        if not requests:
            return []
        longest = max(len(one.prompt_token_ids) + one.sampling.max_new_tokens for one in requests)
        wanted = sum(one.num_answers for one in requests)
        slots = slots_for(bucket_of(wanted, self._slots), self._model.mesh)
        return self._engine(slots, bucket_of(longest, self._lengths)).generate_in_order(requests)

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
