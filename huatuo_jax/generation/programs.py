"""The compiled programs of an engine: one for each bucket, whatever the requests.

`prefill` runs prompts of one length into the prompt cache, and `extend` the rest of prompts whose
start is there; `insert` copies a prompt from there into the pages of a slot (so that all its
answers share one prefill), `grow` and `shrink` change the number of pages, and `decode` runs
several steps for all slots.
"""

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from huatuo_jax.backbone.transformer import Transformer
from huatuo_jax.core import sharding
from huatuo_jax.core.sharding import OnMesh
from huatuo_jax.generation import cache as caches
from huatuo_jax.generation import forward
from huatuo_jax.generation.cache import Cache, Pages
from huatuo_jax.generation.forward import Variables
from huatuo_jax.generation.sampling import Settings, TopTokens, choose, no_top_tokens

STEPS_PER_ROUND = 8
PAGE_SIZE = 64

_NOTHING = -1


class Progress(NamedTuple):
    """The progress of each slot.

    Attributes:
        tokens_B: int32, the latest token, which the model has not read yet.
        positions_B: int32, its position.
        generated_B: int32, tokens of the answer so far.
        active_B: bool, the slot holds an unfinished answer.
    """

    tokens_B: Any
    positions_B: Any
    generated_B: Any
    active_B: Any


class Emitted(NamedTuple):
    """The results of N steps of B slots; tokens are -1 where a slot was idle.

    `top` is of `[N, B, K]`, and None where the host has no use for it.
    """

    tokens_NB: Any
    log_probs_NB: Any
    sampling_log_probs_NB: Any
    top: TopTokens | None


class Programs:
    """The programs, compiled when first needed.

    Attributes:
        page_size: positions of a page.
        compilations: how often each kind of program was compiled.
        allocate: makes an empty cache of `num_pages` pages.
        prefill: takes variables, the prompt cache (donated) and padded prompts `[R, T]`; returns
            the prompt cache with the prompts at the start of its rows.
        extend: takes variables, the prompt cache (donated), padded tokens `[R, T]` and where each
            row's first one belongs; returns the prompt cache with them.
        insert: takes a cache (donated), another one and the page numbers of `cache.copy_pages`;
            returns the first with these pages of the second.
        grow: takes the cache; returns it with `added` more pages in each shard.
        shrink: takes the cache and the targets of `PageTable.shrink`; returns the cache without the
            last pages of its shards, which move.
        decode: takes variables, the cache (donated), `Pages`, `Progress` and `Settings`; returns
            cache, progress and `Emitted` after some steps of all slots, fewer once none is active.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        mesh: Mesh | None,
        max_length: int,
        page_size: int,
        steps: int,
        cache_dtype: DTypeLike,
        split_layers: bool,
    ) -> None:
        """Prepares the programs; none is compiled yet.

        Args:
            model: the backbone.
            mesh: devices; None for the device of the weights.
            max_length: positions of a slot at most.
            page_size: positions of a page.
            steps: decode steps of one call.
            cache_dtype: of keys and values.
            split_layers: layers are a tuple rather than stacked.
        """
        self._model, self._mesh, self._steps = model, mesh, steps
        self._max_length, self.page_size = max_length, page_size
        self.compilations: Counter[str] = Counter()
        places = results = None
        if mesh is not None:
            places = caches.shardings(model.cfg, mesh, split_layers=split_layers)
            # The host reads the results: replicated, so that each process sees all of them.
            replicated = NamedSharding(mesh, P())
            results = (places, replicated, replicated)
        empty = functools.partial(
            caches.empty,
            model.cfg,
            page_size=page_size,
            dtype=cache_dtype,
            split_layers=split_layers,
        )
        prefill = functools.partial(forward.prefill, model)
        self.allocate = self._jit(
            "allocate", empty, out_shardings=places, static_argnames=("num_pages",)
        )
        self.prefill = self._jit("prefill", prefill, donate_argnums=(1,), out_shardings=places)
        extend = functools.partial(forward.extend, model, max_length=max_length)
        self.extend = self._jit("extend", extend, donate_argnums=(1,), out_shardings=places)
        self.insert = self._jit("insert", _copy_pages, donate_argnums=(0,), out_shardings=places)
        self.grow = self._jit("grow", _grow, out_shardings=places, static_argnames=("added",))
        self.shrink = self._jit("shrink", _shrink, out_shardings=places)
        self.decode = self._jit(
            "decode", self._run_decode, donate_argnums=(1,), out_shardings=results
        )

    def _jit(self, name: str, function: Callable[..., Any], **options: Any) -> OnMesh:
        """Returns the jitted function, which counts its tracings."""

        def counted(*arguments: Any, **keywords: Any) -> Any:
            self.compilations[name] += 1
            return function(*arguments, **keywords)

        return OnMesh(jax.jit(counted, **options), self._mesh)

    def _run_decode(
        self,
        variables: Variables,
        cache: Cache,
        pages: Pages,
        progress: Progress,
        settings: Settings,
    ) -> tuple[Cache, Progress, Emitted]:
        batch = progress.tokens_B.shape[0]
        nothing = Emitted(
            jnp.full((self._steps, batch), _NOTHING, jnp.int32),
            jnp.zeros((self._steps, batch), jnp.float32),
            jnp.zeros((self._steps, batch), jnp.float32),
            no_top_tokens(self._steps, batch, self._model.cfg.padded_vocab_size),
        )
        seen_BV = _seen_tokens(cache, pages, progress, settings, self._model.cfg.padded_vocab_size)
        rows_B = jnp.arange(batch)

        def goes_on(carry: Any) -> jax.Array:
            step, _, progress, *_ = carry
            return (step < self._steps) & progress.active_B.any()

        def one_step(carry: Any) -> Any:
            step, cache, progress, rows, seen_BV, emitted = carry
            active_B = progress.active_B
            logits_BV, cache = forward.decode(
                self._model, variables, progress.tokens_B, progress.positions_B, rows, cache, pages
            )
            chosen = choose(
                logits_BV, seen_BV, settings, generated_B=progress.generated_B, active_B=active_B
            )
            shown_B = jnp.where(active_B, chosen.tokens_B, _NOTHING)
            emitted = Emitted(
                emitted.tokens_NB.at[step].set(shown_B),
                emitted.log_probs_NB.at[step].set(chosen.log_probs_B),
                emitted.sampling_log_probs_NB.at[step].set(chosen.sampling_log_probs_B),
                jax.tree.map(lambda all, new: all.at[step].set(new), emitted.top, chosen.top),
            )
            progress = self._advance(progress, chosen.tokens_B, settings)
            seen_BV = seen_BV.at[rows_B, chosen.tokens_B].max(active_B)
            rows = forward.rows_at(self._model, progress.positions_B)
            return step + 1, cache, progress, rows, seen_BV, emitted

        rows = forward.rows_at(self._model, progress.positions_B)
        carry = (jnp.int32(0), cache, progress, rows, seen_BV, nothing)
        _, cache, progress, *_, emitted = jax.lax.while_loop(goes_on, one_step, carry)
        return cache, progress, emitted

    def _advance(self, before: Progress, tokens_B: jax.Array, settings: Settings) -> Progress:
        """Returns the progress after a token; a slot that ends keeps its position."""
        generated_B = before.generated_B + before.active_B.astype(jnp.int32)
        stopped_B = (tokens_B[:, None] == settings.stop_token_ids_BE).any(axis=-1)
        # The new token is one position further: with it the row holds two more than the position.
        full_B = before.positions_B + 2 >= self._max_length
        ended_B = stopped_B | full_B | (generated_B >= settings.max_new_tokens_B)
        active_B = before.active_B & ~ended_B
        return Progress(
            jnp.where(active_B, tokens_B, before.tokens_B),
            jnp.where(active_B, before.positions_B + 1, before.positions_B),
            generated_B,
            active_B,
        )


@functools.lru_cache(maxsize=8)
def programs_of(model: Transformer, **settings: Any) -> Programs:
    """Returns the programs of a model, which all its engines of the same settings share.

    An engine made anew, as for each model of an evaluation, then traces and compiles nothing.

    Args:
        model: the backbone.
        **settings: see `Programs`.
    """
    return Programs(model, **settings)


def _copy_pages(cache: Cache, source: Cache, sources_M: jax.Array, targets_M: jax.Array) -> Cache:
    specs = _cache_specs(cache)
    copy = caches.on_shards(
        caches.copy_pages, in_specs=(specs, _cache_specs(source), P(), P()), out_specs=specs
    )
    return copy(cache, source, sources_M, targets_M)


def _grow(cache: Cache, *, added: int) -> Cache:
    specs = _cache_specs(cache)
    grow = functools.partial(caches.grow, added=added)
    return caches.on_shards(grow, in_specs=(specs,), out_specs=specs)(cache)


def _shrink(cache: Cache, targets_N: jax.Array) -> Cache:
    specs = _cache_specs(cache)
    shrink = caches.on_shards(caches.shrink, in_specs=(specs, caches.ROWS_SPEC), out_specs=specs)
    return shrink(cache, targets_N)


def _cache_specs(cache: Cache) -> Cache:
    """Returns the partition specs of a cache."""
    return Cache(
        caches.layer_specs(cache.keys, caches.PAGES_SPEC),
        caches.layer_specs(cache.values, caches.PAGES_SPEC),
        caches.ROWS_SPEC,
    )


def _seen_tokens(
    cache: Cache, pages: Pages, progress: Progress, settings: Settings, vocab_size: int
) -> jax.Array:
    """Returns a mask `[B, V]` of each slot's prompt and answer tokens, where it is needed."""
    batch = progress.tokens_B.shape[0]
    find = caches.on_shards(
        functools.partial(caches.seen_tokens, vocab_size=vocab_size),
        in_specs=(caches.ROWS_SPEC,) * 3,
        out_specs=caches.ROWS_SPEC,
    )

    def mark() -> jax.Array:
        seen_BV = find(cache.tokens_PS, pages, progress.positions_B)
        return seen_BV.at[jnp.arange(batch), progress.tokens_B].set(True)

    penalised_B = progress.active_B & (settings.repetition_penalty_B != 1)
    seen_BV = jax.lax.cond(
        penalised_B.any(), mark, lambda: jnp.zeros((batch, vocab_size), dtype=bool)
    )
    return sharding.constrain(seen_BV[:, None], "logits_BTV")[:, 0]
