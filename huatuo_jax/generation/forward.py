"""The model's forward pass with a cache: prompts into it, and one token more for every row.

Layers come stacked, and are scanned, or as a tuple, and are written out one after another. The
first compiles as fast for many layers as for one; the second reads every weight and key where it
lies, which on CPU spares a copy of each in every step.

In a step, a tuple's layers take their new keys in before they are read, in place. Stacked ones
are only read by the scan, which would copy a whole layer to write into it: all their new keys are
put in after it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from huatuo_jax.backbone.config import BackboneConfig
from huatuo_jax.backbone.layers import Rows, attend_to_rows, slopes
from huatuo_jax.backbone.transformer import Layer, Transformer
from huatuo_jax.generation import cache as caches
from huatuo_jax.generation.cache import Cache, Pages
from huatuo_jax.generation.paged_attention import attend_pages

Variables = dict[str, Any]
KeysValues = tuple[jax.Array, jax.Array]


def prefill(model: Transformer, variables: Variables, tokens_BT: jax.Array, cache: Cache) -> Cache:
    """The cache with these tokens at the start of its rows.

    Args:
        model: the backbone.
        variables: its own, layers stacked or split.
        tokens_BT: padded on the right; what the padding leaves in the cache is never read, because
            a later token overwrites a position before it looks at it.
        cache: whose pages are those of as many rows, in their order, of at least T positions.
    """
    batch, length = tokens_BT.shape
    positions_T = jnp.arange(length, dtype=jnp.int32)
    rows = _rows(model, jnp.broadcast_to(positions_T[None, :], (batch, length)))

    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array, memory: None
    ) -> tuple[jax.Array, KeysValues]:
        return attend_to_rows(q, k, v, rows, model.cfg, model.compute), (k, v)

    hidden_BTD = _apply_outer(model, variables, tokens_BT, method="embed")
    _, (keys, values) = _through_layers(model, variables, hidden_BTD, rows, attend, None)
    return Cache(
        caches.write_start(cache.keys, keys),
        caches.write_start(cache.values, values),
        caches.write_start_tokens(cache.tokens_PS, tokens_BT),
    )


def decode(
    model: Transformer,
    variables: Variables,
    tokens_B: jax.Array,
    positions_B: jax.Array,
    cache: Cache,
    pages: Pages,
) -> tuple[jax.Array, Cache]:
    """Each row's next-token logits `[B, V]` after one more token, and the cache with it.

    Args:
        model: the backbone.
        variables: its own, layers stacked or split.
        tokens_B: the token of each row.
        positions_B: where it stands; the row's pages hold all positions before.
        cache: updated in place where it is donated.
        pages: who owns what of it; a row without pages has logits that mean nothing.
    """
    rows = _rows(model, positions_B[:, None])
    split = isinstance(cache.keys, tuple)
    memory = (cache.keys, cache.values)
    attend_to_pages = _attending(model.cfg)

    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array, memory: KeysValues
    ) -> tuple[jax.Array, KeysValues]:
        own: KeysValues | None = (k, v)
        if split:
            memory, own = _written(memory, (k, v), pages, positions_B), None
        attended = attend_to_pages(q, own, memory, pages, positions_B, slopes(model.cfg))
        return attended, memory if split else (k, v)

    hidden_B1D = _apply_outer(model, variables, tokens_B[:, None], method="embed")
    hidden_B1D, (keys, values) = _through_layers(model, variables, hidden_B1D, rows, attend, memory)
    if not split:
        keys, values = _written(memory, (keys, values), pages, positions_B)
    write_tokens = caches.on_shards(
        caches.write_tokens, in_specs=(caches.ROWS_SPEC,) * 4, out_specs=caches.ROWS_SPEC
    )
    tokens_PS = write_tokens(cache.tokens_PS, tokens_B, pages, positions_B)
    hidden_B1D = _apply_outer(model, variables, hidden_B1D, method="normalise")
    logits_B1V = _apply_outer(model, variables, hidden_B1D, method="logits")
    return logits_B1V[:, 0], Cache(keys, values, tokens_PS)


def _attending(cfg: BackboneConfig) -> Callable[..., jax.Array]:
    """What each row's query gathers, `[B, 1, N, H]`, from pages on its own shard.

    Queries, keys and slopes are split by heads, the rest by rows.
    """

    def attend(
        q_B1NH: jax.Array,
        own: KeysValues | None,
        memory: KeysValues,
        pages: Pages,
        positions_B: jax.Array,
        alibi_slopes_N: jax.Array | None,
    ) -> jax.Array:
        attended_BNH = attend_pages(
            q_B1NH[:, 0],
            None if own is None else (own[0][:, 0], own[1][:, 0]),
            *memory,
            pages,
            positions_B,
            sliding_window=cfg.sliding_window,
            alibi_slopes_N=alibi_slopes_N,
        )
        return attended_BNH[:, None].astype(q_B1NH.dtype)

    heads, pool, rows = caches.HEADS_SPEC, caches.PAGES_SPEC, caches.ROWS_SPEC
    return caches.on_shards(
        attend, in_specs=(heads, heads, pool, rows, rows, P("tensor")), out_specs=heads
    )


def _written(
    memory: tuple[Any, Any], new: tuple[Any, Any], pages: Pages, positions_B: jax.Array
) -> tuple[Any, Any]:
    """Keys and values with each row's new ones, of one layer or of all."""
    pool = caches.layer_specs(memory, caches.PAGES_SPEC)
    heads, rows = caches.layer_specs(new, caches.HEADS_SPEC), caches.ROWS_SPEC
    write = caches.on_shards(caches.write_step, in_specs=(pool, heads, rows, rows), out_specs=pool)
    return write(memory, new, pages, positions_B)


def _rows(model: Transformer, positions_BT: jax.Array) -> Rows:
    return model.apply({}, positions_BT, method="rows")


def _apply_outer(
    model: Transformer, variables: Variables, *arguments: jax.Array, method: str
) -> jax.Array:
    """A method of the model that reads no layer."""
    params = {name: value for name, value in variables["params"].items() if name != "layers"}
    return model.apply({"params": params}, *arguments, method=method)


def _through_layers(
    model: Transformer,
    variables: Variables,
    hidden_BTD: jax.Array,
    rows: Rows,
    attend: Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, KeysValues]],
    memories: tuple[Any, Any] | None,
) -> tuple[jax.Array, tuple[Any, Any]]:
    """The residual stream after all layers, and what `attend` handed back in each.

    Args:
        model: the backbone.
        variables: its own.
        hidden_BTD: embeddings.
        rows: where the tokens stand.
        attend: attention, told this layer's part of `memories` last.
        memories: keys and values of every layer; None where attention needs none.
    """
    layer = Layer(model.cfg, model.compute, model.lora)

    def apply(hidden_BTD: jax.Array, weights: Variables, memory: Any) -> tuple[jax.Array, Any]:
        return layer.apply(weights, hidden_BTD, rows, lambda q, k, v: attend(q, k, v, memory))

    weights = {name: collection["layers"] for name, collection in variables.items()}
    if not isinstance(weights["params"], tuple):
        return jax.lax.scan(lambda hidden, x: apply(hidden, *x), hidden_BTD, (weights, memories))
    handed_back = []
    for index in range(model.cfg.num_layers):
        own = {name: layers[index] for name, layers in weights.items()}
        memory = None if memories is None else (memories[0][index], memories[1][index])
        hidden_BTD, new = apply(hidden_BTD, own, memory)
        handed_back.append(new)
    keys, values = zip(*handed_back, strict=True)
    return hidden_BTD, (keys, values)
