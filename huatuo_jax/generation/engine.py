"""The engine: continuous batching over a fixed number of slots.

    engine = Engine(model, {"params": params}, slots=64, max_length=2048, tokenizer=tokenizer)
    for answer in engine.generate(requests):
        ...

A slot that finishes gets the next waiting answer while the others continue. Between two checks of
the slots by the host, several tokens are decoded on the device. The cache grows and shrinks with
the answers.

On a mesh of several processes all of them must make the same calls, with the same requests; each
gets all answers.
"""

import itertools
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import numpy as np
import transformers
from jax.sharding import Mesh
from jax.typing import DTypeLike

from huatuo_jax.backbone.config import BackboneConfig
from huatuo_jax.backbone.transformer import Transformer
from huatuo_jax.core import sharding
from huatuo_jax.generation import weights
from huatuo_jax.generation.buckets import Buckets
from huatuo_jax.generation.cache import Cache, Pages, PageTable, check_fits, num_bytes
from huatuo_jax.generation.prefix_cache import PrefixCache, PromptCache
from huatuo_jax.generation.programs import PAGE_SIZE, STEPS_PER_ROUND, Programs, programs_of
from huatuo_jax.generation.requests import (
    MAX_STOP_TOKENS,
    Answer,
    EngineReport,
    Request,
    Running,
    SlotTable,
    finished,
)

_FREE = 64  # Bytes of weights for one of the cache: reading it as well takes 1 to 2 % longer.


class Pool:
    """The cache of the slots on the device, and the table of its pages on the host.

    Attributes:
        cache: donated to and returned by the programs; set it to what they return.
        shards: batch shards of the mesh.
    """

    cache: Cache

    def __init__(
        self, programs: Programs, buckets: Buckets, *, slots: int, max_length: int, shards: int
    ) -> None:
        """Sets the sizes; `make_room` allocates the cache.

        Args:
            programs: the engine's.
            buckets: the engine's.
            slots: rows.
            max_length: positions of a row at most.
            shards: batch shards of the mesh.
        """
        self._programs, self._sizes = programs, buckets
        self.shards, self._slots_per_shard = shards, slots // shards
        page_size = programs.page_size
        self._table = PageTable(
            rows=slots,
            pages_per_row=-(-max_length // page_size),
            page_size=page_size,
            shards=shards,
        )

    def pages_of(self, rows_R: np.ndarray) -> Pages:
        """Returns the owners of pages for these slots alone, see `PageTable.of_rows`."""
        return self._table.of_rows(rows_R)

    @property
    def pages_in_use(self) -> int:
        """Returns the number of pages that slots own."""
        return self._table.num_owned

    @property
    def pages_per_slot(self) -> int:
        """Returns the number of pages that a slot can own."""
        return self._table.pages.table_BM.shape[1]

    def make_room(self, lengths_B: np.ndarray) -> None:
        """Lets every slot own pages for its length, 0 for a free one, and keeps its content."""
        table, sizes = self._table, self._sizes.pages
        wanted = self._sizes.pages_for(table.needed(lengths_B), table.num_pages)
        if not table.num_pages:
            self.cache = self._programs.allocate(num_pages=wanted)
            table.grow(wanted)
        for size in sizes:
            if table.num_pages < size <= wanted:
                self.cache = self._programs.grow(
                    self.cache, added=(size - table.num_pages) // self.shards
                )
                table.grow(size)
        table.fit(lengths_B)
        for size in reversed(sizes):
            if wanted <= size < table.num_pages:
                self.cache = self._programs.shrink(self.cache, table.shrink(size))

    def pages_of_slot(self, slot: int) -> np.ndarray:
        """Returns a slot's pages `[M]`, counted over all shards, then -1."""
        pages_M = self._table.pages.table_BM[slot]
        first = slot // self._slots_per_shard * (self._table.num_pages // self.shards)
        return np.where(pages_M < 0, -1, first + pages_M).astype(np.int32)

    def insert(self, prompts: Cache, *, row: int, slot: int, length: int) -> None:
        """Copies a prompt of this length from a row of the prompt cache into a slot."""
        targets_M = self.pages_of_slot(slot)
        targets_M[-(-length // self._programs.page_size) :] = -1
        sources_M = row * len(targets_M) + np.arange(len(targets_M), dtype=np.int32)
        self.cache = self._programs.insert(self.cache, prompts, sources_M, targets_M)


class Engine:
    """Generates answers with one model; holds its weights and, while busy, a cache."""

    def __init__(
        self,
        model: Transformer,
        variables: weights.Variables,
        *,
        slots: int,
        max_length: int,
        mesh: Mesh | None = None,
        tokenizer: transformers.PreTrainedTokenizerBase | None = None,
        steps_per_round: int = STEPS_PER_ROUND,
        prefill_rows: int | None = None,
        page_size: int = PAGE_SIZE,
        prefix_cache_pages: int = 0,
        cache_dtype: DTypeLike | None = None,
        cast_weights: bool = True,
        split_layers: bool | None = None,
        narrow: bool | None = None,
        memory_bytes: int | None = None,
    ) -> None:
        """Places the weights and checks that a full cache fits.

        Args:
            model: the backbone, with its `LoraConfig` where adapters are given.
            variables: `{"params": ...}`, and `"lora"` for adapters; see `load`.
            slots: number B of answers decoded at once.
            max_length: tokens of prompt and answer together.
            mesh: devices; slots and weights are sharded over it. None for one device.
            tokenizer: the model's, for texts and stop strings.
            steps_per_round: decode steps between two checks of the host. More steps have less
                overhead, but a slot that ends waits for up to this many.
            prefill_rows: prompts of one prefill; None for one for each batch shard of the mesh.
            page_size: positions of a page of the cache; a slot owns whole pages. Small ones waste
                less, and cost more to combine.
            prefix_cache_pages: pages of earlier prompts and answers to keep for prompts that begin
                with the same tokens, see `PrefixCache`; 0 for none. Answers are those without, up
                to rounding. `load` and `unload` forget them.
            cache_dtype: of keys and values. None for the compute dtype, on CPU at least float32: to
                write into a narrower one, XLA:CPU copies all of it to float32 and back.
            cast_weights: to the compute dtype once rather than in every step.
            split_layers: hold each layer's weights and cache separately, both laid out for the
                products of a CPU, which copies the weights and compiles longer. Decoding on CPU is
                then faster, so None means True there.
            narrow: decode fewer rows once few answers are left, which compiles more programs. On an
                accelerator steps of few rows take as long as others, so None means on CPU only.
            memory_bytes: free memory of all devices together; None reads it from the devices.

        Raises:
            ValueError: an invalid size, a cache that does not fit, a model with fewer positions
                than `max_length`, or weights that the mesh does not divide.
        """
        cfg = model.cfg
        sizes = {"slots": slots, "steps_per_round": steps_per_round, "page_size": page_size}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}={size} must be above 0")
        if not 2 <= max_length <= cfg.max_positions:
            raise ValueError(
                f"max_length={max_length} must lie between 2 and the model's "
                f"{cfg.max_positions} positions"
            )
        cfg.require_fixed_angles(max_length, purpose="cached decoding")
        if prefix_cache_pages < 0:
            raise ValueError(f"prefix_cache_pages={prefix_cache_pages} must be 0 or more")
        shards = sharding.batch_shards(mesh)
        self._prefill_rows = shards if prefill_rows is None else prefill_rows
        sizes = {"slots": slots, "prefill_rows": self._prefill_rows}
        if prefix_cache_pages:
            sizes["prefix_cache_pages"] = prefix_cache_pages
        for name, size in sizes.items():
            if size < 1 or size % shards:
                raise ValueError(
                    f"{name}={size} must be a multiple of {shards}, the mesh's batch shards"
                )
        platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
        self._split_layers = platform == "cpu" if split_layers is None else split_layers
        dtype = model.compute.compute_dtype if cache_dtype is None else cache_dtype
        if cache_dtype is None and platform == "cpu":
            dtype = jax.numpy.promote_types(dtype, np.float32)
        self._buckets = Buckets.up_to(
            max_length,
            page_size=page_size,
            slots=slots,
            shards=shards,
            narrow=platform == "cpu" if narrow is None else narrow,
            free_pages=_free_pages(variables, cfg, page_size=page_size, dtype=dtype),
        )
        check_fits(
            cfg,
            slots=slots,
            prompt_rows=self._prefill_rows,
            kept_pages=prefix_cache_pages,
            max_length=max_length,
            page_size=page_size,
            pages=self._buckets.pages,
            dtype=dtype,
            mesh=mesh,
            memory_bytes=memory_bytes,
        )
        self._model, self._mesh, self._tokenizer = model, mesh, tokenizer
        self._max_length, self._steps, self._cast = max_length, steps_per_round, cast_weights
        self._programs = programs_of(
            model,
            mesh=mesh,
            max_length=max_length,
            page_size=page_size,
            steps=steps_per_round,
            cache_dtype=np.dtype(dtype),
            split_layers=self._split_layers,
        )
        self._compiled_before = Counter(self._programs.compilations)
        self._table = SlotTable(slots)
        self._queue: deque[tuple[int, Request]] = deque()
        self._prefilled: deque[tuple[int, Running]] = deque()  # (row of the prompt cache, answer)
        self._pool = self._empty_pool()
        self._prefixes = PrefixCache(
            self._programs, num_pages=prefix_cache_pages, pages_per_row=self._pool.pages_per_slot
        )
        self._prompts = PromptCache(
            self._programs,
            self._prefixes,
            rows=self._prefill_rows,
            pages_per_row=self._pool.pages_per_slot,
            lengths=self._buckets.prefill,
        )
        self._num_requests, self._failed = 0, False
        self.load(variables)
        self.reset_report()

    def load(self, variables: weights.Variables) -> None:
        """Loads new weights, such as a policy's after an update, without compiling anything.

        Args:
            variables: `{"params": ...}`, and `"lora"` for adapters, with stacked layers. Arrays
                that already have the sharding and dtype of generation are not copied (but see
                `split_layers`).

        Raises:
            ValueError: answers are unfinished, or the mesh does not divide the weights.
        """
        self._require_idle("load new weights")
        self._prefixes.clear()
        self._variables = weights.place(
            variables,
            self._model.cfg,
            self._model.compute,
            mesh=self._mesh,
            cast=self._cast,
            split_layers=self._split_layers,
        )

    def unload(self) -> None:
        """Releases the weights' memory until the next `load`.

        Raises:
            ValueError: answers are unfinished.
        """
        self._require_idle("release the weights")
        self._prefixes.clear()
        self._variables = {}

    def generate(self, requests: Iterable[Request]) -> Iterator[Answer]:
        """Generates the answers, in the order in which they are completed.

        Raises:
            ValueError: an invalid request, before anything is decoded; or unfinished answers of an
                earlier call.
        """
        self._require_idle("generate")
        waiting = list(requests)
        for index, request in enumerate(waiting):
            try:
                self.check(request)
            except ValueError as error:
                raise ValueError(f"requests[{index}]: {error}") from error
        return self._generate(waiting)

    def generate_in_order(
        self, requests: Iterable[Request], on_answer: Callable[[Answer], None] | None = None
    ) -> list[list[Answer]]:
        """Returns the answers by request, and gives each to `on_answer` as it is completed."""
        requests = list(requests)
        answers: list[list[Answer]] = [[] for _ in requests]
        for answer in self.generate(requests):
            answers[answer.request_index].append(answer)
            if on_answer is not None:
                on_answer(answer)
        return [sorted(group, key=lambda answer: answer.answer_index) for group in answers]

    def check(self, request: Request) -> None:
        """Raises ValueError if this engine cannot answer the request."""
        prompt = np.asarray(request.prompt_token_ids)
        vocab_size = self._model.cfg.vocab_size
        if len(prompt) >= self._max_length:
            raise ValueError(
                f"prompt_token_ids has {len(prompt)} tokens; with one token of an answer at most "
                f"max_length={self._max_length} fit: shorten the prompt"
            )
        if prompt.min() < 0 or prompt.max() >= vocab_size:
            raise ValueError(
                f"prompt_token_ids holds {prompt.min()} to {prompt.max()}; the model's vocabulary "
                f"is 0 to {vocab_size - 1}"
            )
        stops = request.sampling.stop_token_ids
        if unknown := [token_id for token_id in stops if not 0 <= token_id < vocab_size]:
            raise ValueError(
                f"stop_token_ids has {unknown}; the model's vocabulary is 0 to {vocab_size - 1}"
            )
        if len(stops) > MAX_STOP_TOKENS:
            raise ValueError(f"stop_token_ids has {len(stops)} ids, at most {MAX_STOP_TOKENS} fit")
        if request.num_top_log_probs > vocab_size:
            raise ValueError(
                f"num_top_log_probs={request.num_top_log_probs}; the model has {vocab_size} tokens"
            )
        if request.sampling.stop_strings and self._tokenizer is None:
            raise ValueError("stop_strings need an engine with a tokenizer")

    def submit(self, request: Request) -> int:
        """Queues a request for `step` and returns its index, for callers that stream.

        Raises:
            ValueError: this engine cannot answer it.
        """
        self.check(request)
        self._num_requests += 1
        self._queue.append((self._num_requests - 1, request))
        return self._num_requests - 1

    def abort(self, request_index: int) -> None:
        """Drops a request with all its answers; their slots are free for the next step.

        An unknown index, or one whose answers are complete, does nothing.
        """
        self._queue = deque(one for one in self._queue if one[0] != request_index)
        self._prefilled = deque(
            one for one in self._prefilled if one[1].request_index != request_index
        )
        for slot, running in enumerate(self._table.running):
            if running is not None and running.request_index == request_index:
                self._leave(slot)
        if not self.busy:
            self._rest()

    def reset(self) -> dict[int, Request]:
        """Drops everything, also after a `step` that raised, and returns the unfinished requests.

        Submitted again, under new indices, they have the same answers. A caller finds the one that
        makes a step fail by trying them one after another.

        Returns:
            The requests by their index, those with an answer that is complete included if another
            one is not.
        """
        unfinished = dict(self._queue)
        for running in (*self.running, *(one for _, one in self._prefilled)):
            unfinished[running.request_index] = running.request
        self._rest()
        return dict(sorted(unfinished.items()))

    @property
    def running(self) -> list[Running]:
        """Returns the unfinished answers in slots, for callers that stream after each step."""
        return [running for running in self._table.running if running is not None]

    @property
    def busy(self) -> bool:
        """Returns True while answers are waiting or unfinished."""
        return bool(self._queue or self._prefilled) or any(self._table.running)

    def step(self) -> list[Answer]:
        """Runs one round, filling free slots and decoding; returns the answers it completed.

        After an exception the requests are all still there, but not what the device held of them:
        call `reset`, or `abort` for each.

        Raises:
            ValueError: neither was called after a step that failed.
        """
        if self._failed:
            raise ValueError("cannot decode: the step before failed; call reset() first")
        try:
            return self._round()
        except BaseException:  # An interrupt too.
            self._failed = True
            raise

    def _round(self) -> list[Answer]:
        started_s = time.perf_counter()
        self._pool.make_room(self._lengths_of_a_round())
        self._fill_slots()
        waiting = bool(self._queue or self._prefilled)
        rows_R = self._table.rows_to_decode(self._buckets.rows, shards=self._pool.shards)
        self._pool.cache, progress, emitted = self._programs.decode(
            self._variables,
            self._pool.cache,
            self._pool.pages_of(rows_R),
            *self._table.of_rows(rows_R),
        )
        if not self._table.wants_top:
            emitted = emitted._replace(top=None)
        progress, emitted = jax.device_get((progress, emitted))
        num_tokens = self._table.take(rows_R, progress, emitted)
        if waiting:
            steps = int((emitted.tokens_NB >= 0).any(axis=1).sum())
            self._queued_steps += steps * len(self._table.running)
            self._queued_busy_steps += num_tokens
        answers = self._collect()
        if not self.busy:
            self._rest()
        self._rounds += 1
        self._generated_tokens += num_tokens
        self._seconds += time.perf_counter() - started_s
        return answers

    def reset_report(self) -> None:
        """Restarts the counts."""
        self._rounds = self._generated_tokens = 0
        self._prompt_tokens = self._cached_prompt_tokens = 0
        self._queued_steps = self._queued_busy_steps = 0
        self._seconds = 0.0

    @property
    def report(self) -> EngineReport:
        """Returns the counts since the last `reset_report`."""
        return EngineReport(
            prompt_tokens=self._prompt_tokens,
            cached_prompt_tokens=self._cached_prompt_tokens,
            generated_tokens=self._generated_tokens,
            seconds=self._seconds,
            rounds=self._rounds,
            queued_slot_steps=self._queued_steps,
            queued_busy_slot_steps=self._queued_busy_steps,
            pages_in_use=self._pool.pages_in_use,
            compilations=dict(self._programs.compilations - self._compiled_before),
            max_compilations=self._buckets.num_programs
            + (self._buckets.num_prefix_programs if self._prefixes.num_pages else 0),
        )

    def _generate(self, requests: list[Request]) -> Iterator[Answer]:
        self._require_idle("generate")
        self._num_requests = 0
        try:
            for request in requests:
                self.submit(request)
            while self.busy:
                yield from self.step()
        finally:
            self._rest()  # Also where the caller stops early.

    def _lengths_of_a_round(self) -> np.ndarray:
        """Returns each slot's positions after the next round, for slots filled in it too."""
        lengths_B = self._table.lengths_B
        occupied_B = self._table.progress.active_B.copy()
        for slot, prompt in zip(self._table.free, self._prompts_to_come(), strict=False):
            lengths_B[slot], occupied_B[slot] = len(prompt) - 1, True
        reached_B = np.minimum(lengths_B + self._steps, self._max_length)
        return np.where(occupied_B, reached_B, 0)

    def _prompts_to_come(self) -> Iterator[Sequence[int]]:
        """Yields the prompts of waiting answers, in the order in which slots are filled."""
        for _, running in self._prefilled:
            yield running.request.prompt_token_ids
        for _, request in self._queue:
            yield from itertools.repeat(request.prompt_token_ids, request.num_answers)

    def _fill_slots(self) -> None:
        """Gives every free slot the next answer, prefilling prompts as needed."""
        for slot in self._table.free:
            if not self._prefilled:
                if not self._queue:
                    return
                self._prefill()
            row, running = self._prefilled[0]  # Taken out once it is in a slot.
            length = len(running.request.prompt_token_ids) - 1
            self._pool.insert(self._prompts.cache, row=row, slot=slot, length=length)
            self._table.occupy(slot, running)
            self._prefilled.popleft()

    def _prefill(self) -> None:
        """Runs the next prompts into the prompt cache, and queues their answers."""
        count = min(self._prefill_rows, len(self._queue))
        taken = [self._queue[place] for place in range(count)]  # Taken out once they are run.
        # All but the last token, which the first decode step runs.
        prompts = [list(request.prompt_token_ids)[:-1] for _, request in taken]
        num_cached = self._prompts.run(self._variables, prompts)
        self._prompt_tokens += sum(map(len, prompts)) + count - num_cached
        self._cached_prompt_tokens += num_cached
        for row, (index, request) in enumerate(taken):
            self._queue.popleft()
            for answer_index in range(request.num_answers):
                self._prefilled.append((row, Running(index, request, answer_index)))

    def _collect(self) -> list[Answer]:
        """Returns the answers that are complete; their slots become free."""
        complete = {}
        for slot, running in enumerate(self._table.running):
            if running is None:
                continue
            active = bool(self._table.progress.active_B[slot])
            answer = finished(running, active=active, tokenizer=self._tokenizer)
            if answer is not None:
                complete[slot] = answer
        for slot in complete:  # Only now, so that a failure loses no answer.
            self._leave(slot)
        return list(complete.values())

    def _leave(self, slot: int) -> None:
        """Frees a slot, and keeps what it has read for later prompts."""
        running = self._table.running[slot]
        assert running is not None
        if self._prefixes.num_pages and not self._failed:
            # The last token has not been read.
            token_ids = [*running.request.prompt_token_ids, *running.token_ids][:-1]
            pages = self._pool.pages_of_slot(slot).tolist()
            self._prefixes.keep(token_ids, self._pool.cache, pages)
        self._table.free_slot(slot)

    def _require_idle(self, purpose: str) -> None:
        if self.busy:
            raise ValueError(f"cannot {purpose}: the engine still has unfinished answers")

    def _rest(self) -> None:
        """Drops all unfinished answers, and releases the caches' memory."""
        self._queue.clear()
        self._prefilled.clear()
        for slot in range(len(self._table.running)):
            self._table.free_slot(slot)
        self._pool = self._empty_pool()
        self._prompts.release()
        if self._failed:
            self._prefixes.clear()
        self._failed = False

    def _empty_pool(self) -> Pool:
        return Pool(
            self._programs,
            self._buckets,
            slots=len(self._table.running),
            max_length=self._max_length,
            shards=sharding.batch_shards(self._mesh),
        )


def _free_pages(
    variables: weights.Variables, cfg: BackboneConfig, *, page_size: int, dtype: DTypeLike
) -> int:
    """Counts the pages that a decode step reads in hardly any time beside the weights.

    A larger model then answers a few requests by the programs of one size of cache, rather than
    compile those of every size that the answers grow through.
    """
    numbers = sum(leaf.size for leaf in jax.tree.leaves(weights.that_are_read(variables)))
    page = num_bytes(cfg, positions=page_size, dtype=dtype)
    return numbers * np.dtype(dtype).itemsize // (_FREE * page)
