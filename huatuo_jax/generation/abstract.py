"""An engine's largest programs and their arguments as shapes, without weights or a cache."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from huatuo_jax.backbone.transformer import Transformer
from huatuo_jax.core import sharding
from huatuo_jax.generation import cache as caches
from huatuo_jax.generation import weights
from huatuo_jax.generation.buckets import Buckets
from huatuo_jax.generation.cache import PageTable
from huatuo_jax.generation.programs import PAGE_SIZE, STEPS_PER_ROUND, Programs
from huatuo_jax.generation.requests import SlotTable


class AbstractEngine(NamedTuple):
    """The programs of an engine with full slots.

    Attributes:
        programs: `prefill` and `decode` of them.
        prefill_arguments: for the longest prompts.
        decode_arguments: for all slots at their longest.
        prompt_tokens: tokens of a prefill.
        steps: steps of a decode call.
    """

    programs: Programs
    prefill_arguments: tuple[Any, ...]
    decode_arguments: tuple[Any, ...]
    prompt_tokens: int
    steps: int


def abstract_engine(
    model: Transformer, variables: Any, *, slots: int, max_length: int, mesh: Mesh
) -> AbstractEngine:
    """Returns the programs of `Engine(model, variables, slots=..., max_length=..., mesh=...)`.

    Layers are stacked, as on every platform but the CPU.

    Args:
        model: the backbone.
        variables: abstract, with stacked layers, on any mesh.
        slots: answers decoded at once.
        max_length: tokens of prompt and answer together.
        mesh: devices.
    """
    shards = sharding.batch_shards(mesh)
    buckets = Buckets.up_to(max_length, page_size=PAGE_SIZE, slots=slots, shards=shards)
    dtype = model.compute.compute_dtype
    programs = Programs(
        model,
        mesh=mesh,
        max_length=max_length,
        page_size=PAGE_SIZE,
        steps=STEPS_PER_ROUND,
        cache_dtype=dtype,
        split_layers=False,
    )
    pages_per_row = -(-max_length // PAGE_SIZE)
    table = PageTable(rows=slots, pages_per_row=pages_per_row, page_size=PAGE_SIZE, shards=shards)
    table.grow(buckets.pages[-1])
    held = SlotTable(slots)
    read = abstract_weights(variables, model, mesh)
    tokens_BT = jax.ShapeDtypeStruct((shards, buckets.prefill[-1]), np.int32)
    return AbstractEngine(
        programs,
        (read, _cache(model, shards * pages_per_row, mesh), tokens_BT),
        (
            read,
            _cache(model, buckets.pages[-1], mesh),
            *_shapes((table.pages, held.progress, held.settings)),
        ),
        prompt_tokens=shards * buckets.prefill[-1],
        steps=STEPS_PER_ROUND,
    )


def abstract_weights(variables: Any, model: Transformer, mesh: Mesh) -> Any:
    """Returns the shapes of the variables as an engine holds them, see `weights.place`."""
    read = weights.that_are_read(variables)
    shapes = weights.stored_shapes(read, model.cfg, model.compute)
    return sharding.abstract_parameters(shapes, mesh)


def _cache(model: Transformer, num_pages: int, mesh: Mesh) -> Any:
    shapes = jax.eval_shape(
        lambda: caches.empty(
            model.cfg,
            num_pages=num_pages,
            page_size=PAGE_SIZE,
            dtype=model.compute.compute_dtype,
            split_layers=False,
        )
    )
    return sharding.abstract_arrays(shapes, caches.shardings(model.cfg, mesh, split_layers=False))


def _shapes(tree: Any) -> Any:
    """Returns the shapes of host arrays, which jax places where the program needs them."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
