"""The engine's programs, called one by one, against a plain loop over the transformer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from huatuo_jax.generation import weights
from huatuo_jax.generation.cache import PageTable
from huatuo_jax.generation.programs import Programs
from huatuo_jax.generation.requests import Running, SlotTable
from tests.generation import tiny

LENGTH, PAGE, SLOTS, STEPS = 24, 4, 3, 5
PAGES_PER_SLOT = LENGTH // PAGE


class Slots:
    """The programs with what the engine holds for them: cache, page table and table of slots."""

    def __init__(self, *, split_layers):
        model = tiny.MODEL
        self.programs = Programs(
            model,
            mesh=None,
            max_length=LENGTH,
            page_size=PAGE,
            steps=STEPS,
            cache_dtype=jnp.float32,
            split_layers=split_layers,
        )
        self.variables = weights.place(
            tiny.variables(),
            model.cfg,
            model.compute,
            mesh=None,
            cast=True,
            split_layers=split_layers,
        )
        self.slots = SlotTable(SLOTS)
        self.table = PageTable(rows=SLOTS, pages_per_row=PAGES_PER_SLOT, page_size=PAGE)
        self.table.grow(SLOTS * PAGES_PER_SLOT)
        self.cache = self.programs.allocate(num_pages=SLOTS * PAGES_PER_SLOT)

    def admit(self, slot, request, *, answer_index=0):
        prompt = request.prompt_token_ids
        tokens_BT = np.zeros((1, LENGTH), np.int32)
        tokens_BT[0, : len(prompt)] = prompt
        prefix = self.programs.allocate(num_pages=PAGES_PER_SLOT)
        prefix = self.programs.prefill(self.variables, prefix, tokens_BT)
        self.slots.occupy(slot, Running(slot, request, answer_index))
        self.table.fit([LENGTH if running else 0 for running in self.slots.running])
        targets_M = self.table.pages.table_BM[slot].copy()
        targets_M[-(-len(prompt) // PAGE) :] = -1
        self.cache = self.programs.insert(
            self.cache, prefix, np.arange(PAGES_PER_SLOT, dtype=np.int32), targets_M
        )

    def decode(self):
        self.cache, progress, emitted = self.programs.decode(
            self.variables,
            self.cache,
            self.table.pages,
            self.slots.progress,
            self.slots.settings,
        )
        emitted = jax.tree.map(np.asarray, emitted)
        self.slots.take(np.arange(SLOTS), progress, emitted)
        return emitted


@pytest.fixture(params=[False, True], ids=["stacked", "split"])
def slots(request):
    return Slots(split_layers=request.param)


@jax.jit
def next_logits(tokens_T, length):
    """The logits `[V]` after the first `length` tokens, by the model without a cache."""
    hidden_BTD = tiny.MODEL.apply(tiny.variables(), tokens_T[None])
    return tiny.MODEL.apply(tiny.variables(), hidden_BTD, method="logits")[0, length - 1]


def plain(request, count, *, answer_index=0):
    """Tokens and log-probabilities of an answer, one forward pass for each token."""
    temperature = request.sampling.temperature
    ids, log_probs = list(request.prompt_token_ids), []
    for number in range(count):
        padded_T = np.pad(np.array(ids, np.int32), (0, LENGTH - len(ids)))
        scores_V = next_logits(padded_T, len(ids)) / (temperature or 1.0)
        noise_V = jnp.zeros_like(scores_V)
        if temperature:
            key = jax.random.fold_in(jax.random.key(np.uint32(request.seed)), answer_index)
            noise_V = jax.random.gumbel(jax.random.fold_in(key, number), scores_V.shape)
        token = int(jnp.argmax(scores_V + noise_V))
        ids.append(token)
        log_probs.append(float(jax.nn.log_softmax(scores_V)[token]))
    return ids[len(request.prompt_token_ids) :], log_probs


def test_decoded_tokens_are_those_of_a_plain_greedy_loop(slots):
    requests = [tiny.request(7, seed=1, temperature=0.0), tiny.request(12, seed=2, temperature=0.0)]
    for slot, request in enumerate(requests):
        slots.admit(slot, request)
    first, second = slots.decode(), slots.decode()
    for slot, request in enumerate(requests):
        tokens, log_probs = plain(request, 2 * STEPS)
        assert slots.slots.running[slot].token_ids == tokens
        assert [*first.tokens_NB[:, slot], *second.tokens_NB[:, slot]] == tokens
        np.testing.assert_allclose(slots.slots.running[slot].log_probs, log_probs, atol=1e-4)
        assert slots.slots.running[slot].sampling_log_probs == [0.0] * (2 * STEPS)


def test_drawn_tokens_follow_from_seed_answer_and_index_alone(slots):
    request = tiny.request(5, seed=3, temperature=0.8)
    slots.admit(0, request)
    slots.decode()
    slots.admit(2, request, answer_index=4)  # Later than the first, in another slot.
    slots.decode()
    for slot, answer_index, count in ((0, 0, 2 * STEPS), (2, 4, STEPS)):
        tokens, log_probs = plain(request, count, answer_index=answer_index)
        running = slots.slots.running[slot]
        assert running.token_ids == tokens
        np.testing.assert_allclose(running.log_probs, log_probs, atol=1e-4)
        np.testing.assert_allclose(running.sampling_log_probs, log_probs, atol=1e-4)


def test_idle_slots_emit_no_token_and_keep_their_progress(slots):
    slots.admit(1, tiny.request(6, temperature=0.0))
    emitted = slots.decode()
    assert (emitted.tokens_NB[:, [0, 2]] == -1).all() and (emitted.tokens_NB[:, 1] >= 0).all()
    progress = slots.slots.progress
    assert progress.positions_B.tolist() == [0, 5 + STEPS, 0]
    assert progress.generated_B.tolist() == [0, STEPS, 0]
    assert progress.active_B.tolist() == [False, True, False]


def test_an_answer_ends_at_its_tokens_its_stop_token_or_the_row_end(slots):
    tokens, _ = plain(tiny.request(9, seed=1), STEPS)
    assert tokens[1] != tokens[0]
    slots.admit(0, tiny.request(9, seed=1, max_new_tokens=3))
    slots.admit(1, tiny.request(9, seed=1, stop_token_ids=(tokens[1],)))
    slots.admit(2, tiny.request(LENGTH - 4, seed=1))
    emitted = slots.decode()
    assert emitted.tokens_NB[:, 0].tolist() == [*tokens[:3], -1, -1]
    assert emitted.tokens_NB[:, 1].tolist() == [*tokens[:2], -1, -1, -1]
    assert (emitted.tokens_NB[:, 2] >= 0).tolist() == [True] * 4 + [False]
    assert not slots.slots.progress.active_B.any()
    assert (slots.decode().tokens_NB == -1).all()


def test_a_cache_that_grows_and_shrinks_continues_the_same_answers(slots):
    request = tiny.request(6, seed=5, temperature=0.0)
    slots.admit(2, request)
    slots.decode()
    slots.cache = slots.programs.grow(slots.cache, added=PAGES_PER_SLOT)
    slots.table.grow(slots.table.num_pages + PAGES_PER_SLOT)
    slots.decode()
    slots.cache = slots.programs.shrink(slots.cache, slots.table.shrink(PAGES_PER_SLOT))
    assert slots.cache.num_pages == PAGES_PER_SLOT
    slots.decode()
    assert slots.slots.running[2].token_ids == plain(request, 3 * STEPS)[0]


def test_a_program_is_compiled_once_for_its_shapes(slots):
    for seed in range(3):
        slots.admit(seed, tiny.request(4 + seed, seed=seed, temperature=0.5 * seed))
        slots.decode()
    assert slots.programs.compilations == {"allocate": 2, "prefill": 1, "insert": 1, "decode": 1}
