"""Later turns, and prompts that begin alike, are not run through the model again."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from huatuo_jax.backbone.transformer import Transformer
from huatuo_jax.core import sharding
from huatuo_jax.generation.cache import Cache
from huatuo_jax.generation.prefix_cache import PrefixCache
from huatuo_jax.generation.programs import Programs, programs_of
from huatuo_jax.generation.requests import Request, SamplingConfig
from tests.generation import tiny

PAGE = 8
GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=19)
DRAWN = SamplingConfig(temperature=1.1, top_p=0.95, repetition_penalty=1.2, max_new_tokens=21)
WINDOWED = Transformer(tiny.config(sliding_window=11))
ALIBI = Transformer(tiny.config(position="alibi", rope=None))


def engine(*, pages=64, **options):
    options = {"slots": 4, "max_length": 256, "page_size": PAGE} | options
    return tiny.engine(prefix_cache_pages=pages, **options)


def converse(engine, sampling, *, turns=4, seed=0, others=()):
    """The tokens of the answers to the turns of a conversation, each beside other requests."""
    prompt, found = tiny.prompt(21, seed=seed), []
    for turn in range(turns):
        asked = Request(prompt_token_ids=prompt, sampling=sampling, seed=seed + turn)
        answers = engine.generate_in_order([*others, asked, *others])
        (answer,) = answers[len(others)]
        found.append(answer.token_ids)
        prompt = [*prompt, *answer.token_ids, *tiny.prompt(6 + turn, seed=100 + turn)]
    return found


@functools.cache
def plain_turns(sampling, *, seed=0, model=tiny.MODEL):
    """The answers of an engine that keeps nothing."""
    return converse(engine(pages=0, model=model), sampling, seed=seed)


def token_ids(engine, requests):
    return [[one.token_ids for one in group] for group in engine.generate_in_order(requests)]


def cached_tokens(answers):
    """Tokens of the whole pages that each turn after the first one finds of the turn before."""
    length, cached = 21, 0
    for turn, answer in enumerate(answers[:-1]):
        length += len(answer)
        cached += (length - 1) // PAGE * PAGE  # The answer's last token was not read.
        length += 6 + turn
    return cached, length


@pytest.mark.parametrize("split_layers", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_greedy_turns_are_the_same_and_only_their_new_tokens_are_run(split_layers):
    programs_of.cache_clear()  # So that all that it needs is compiled here.
    own = engine(split_layers=split_layers)
    expected = plain_turns(GREEDY)
    assert converse(own, GREEDY) == expected
    cached, length = cached_tokens(expected)
    assert own.report.cached_prompt_tokens == cached > 100
    lengths = [21]
    for turn, answer in enumerate(expected[:-1]):
        lengths.append(lengths[-1] + len(answer) + 6 + turn)
    assert lengths[-1] == length
    assert own.report.prompt_tokens == sum(lengths) - cached
    assert sum(own.report.compilations.values()) <= own.report.max_compilations


def test_drawn_turns_follow_from_their_seed_whatever_is_cached():
    expected = plain_turns(DRAWN)
    others = [tiny.request(33, seed=5, num_answers=3, max_new_tokens=40)]
    own = engine()
    assert converse(own, DRAWN) == expected
    before = own.report.cached_prompt_tokens
    assert converse(own, DRAWN, others=others) == expected
    assert own.report.cached_prompt_tokens > 2 * before
    assert converse(own, DRAWN, seed=50) == plain_turns(DRAWN, seed=50)


@pytest.mark.slow
@pytest.mark.parametrize("model", [WINDOWED, ALIBI], ids=["sliding window", "alibi"])
def test_greedy_turns_are_the_same_with_other_attention(model):
    own = engine(model=model)
    assert converse(own, GREEDY) == plain_turns(GREEDY, model=model)
    assert own.report.cached_prompt_tokens > 100


@pytest.mark.slow
def test_greedy_turns_are_the_same_with_a_cache_of_lower_precision():
    """Prompts read rounded keys and values with and without cached pages."""
    own = engine(cache_dtype=jnp.bfloat16)
    assert converse(own, GREEDY) == converse(engine(pages=0, cache_dtype=jnp.bfloat16), GREEDY)
    assert own.report.cached_prompt_tokens > 100


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"data": 4, "tensor": 2}, {"data": 8}])
def test_turns_are_the_same_on_eight_devices(axes):
    own = engine(slots=8, mesh=sharding.make_mesh(**axes))
    others = [tiny.request(18, seed=5, num_answers=5, max_new_tokens=9)]
    assert converse(own, GREEDY, others=others) == plain_turns(GREEDY)
    assert converse(own, DRAWN) == plain_turns(DRAWN)
    assert own.report.cached_prompt_tokens > 300


@pytest.mark.parametrize("pages", [3, 9, 14])
def test_turns_are_the_same_where_few_pages_fit(pages):
    own = engine(pages=pages)
    expected = plain_turns(GREEDY)
    for _ in range(2):
        others = [tiny.request(30, seed=9, max_new_tokens=30)]
        assert converse(own, GREEDY, others=others) == expected
    assert own.report.cached_prompt_tokens > 0


def test_a_shared_start_is_run_once_and_a_prompt_that_is_cached_whole_runs_one_token():
    own, start = engine(), tiny.prompt(40, seed=1)
    requests = [
        Request(prompt_token_ids=[*start, *tiny.prompt(9, seed=seed)], sampling=GREEDY)
        for seed in range(5)
    ]
    requests.append(Request(prompt_token_ids=[*start, 7], sampling=GREEDY))
    expected = token_ids(engine(pages=0), requests)
    assert token_ids(own, requests) == expected
    assert own.report.cached_prompt_tokens == 5 * 40
    assert own.report.prompt_tokens == 49 + 4 * 9 + 1


def test_an_aborted_answer_is_kept_and_the_next_turn_is_the_same():
    own, plain = engine(), engine(pages=0)
    opening = tiny.request(21, seed=3, max_new_tokens=60, temperature=0.9)
    index = own.submit(opening)
    beside = own.submit(tiny.request(21, seed=4, max_new_tokens=30, temperature=0.9))
    for _ in range(3):
        own.step()
    (begun,) = (one.token_ids for one in own.running if one.request_index == index)
    own.abort(index)
    following = Request(
        prompt_token_ids=[*opening.prompt_token_ids, *begun, 5, 6, 7], sampling=DRAWN, seed=8
    )
    turn = own.submit(following)
    answers = {}
    while own.busy:
        answers |= {answer.request_index: answer.token_ids for answer in own.step()}
    assert own.report.cached_prompt_tokens == (21 + len(begun) - 1) // PAGE * PAGE
    ((expected,),) = plain.generate_in_order([following])
    assert answers[turn] == expected.token_ids
    assert answers.keys() == {beside, turn}


def test_new_weights_forget_what_the_old_ones_read():
    own = engine()
    converse(own, GREEDY)
    changed = jax.tree.map(lambda x: x[..., ::-1], tiny.variables())
    own.load(changed)
    own.reset_report()
    fresh = engine()
    fresh.load(changed)
    assert converse(own, GREEDY) == converse(fresh, GREEDY)
    assert own.report.cached_prompt_tokens == fresh.report.cached_prompt_tokens
    own.unload()
    assert own._prefixes._cache is None


@pytest.mark.parametrize("split_layers", [True, False])
@pytest.mark.parametrize("model", [tiny.MODEL, WINDOWED, ALIBI], ids=["rotary", "window", "alibi"])
def test_an_extended_prompt_has_the_keys_and_values_of_a_whole_one(model, split_layers):
    own = engine(model=model, split_layers=split_layers, prefill_rows=2)
    programs, variables = own._programs, own._variables
    tokens_RT = np.array([tiny.prompt(48, seed=seed) for seed in (1, 2)], np.int32)
    starts_R = np.array([24, 8], np.int32)
    whole = programs.prefill(variables, programs.allocate(num_pages=2 * 32), tokens_RT)
    # What lies after the start has no meaning: zeros here.
    begun_RT = np.where(np.arange(48) < starts_R[:, None], tokens_RT, 0)
    extended = programs.prefill(variables, programs.allocate(num_pages=2 * 32), begun_RT)
    rest_RT = np.zeros((2, 40), np.int32)
    for row, start in enumerate(starts_R):
        rest_RT[row, : 48 - start] = tokens_RT[row, start:]
    extended = programs.extend(variables, extended, rest_RT, starts_R)
    for one, other in zip(jax.tree.leaves(extended), jax.tree.leaves(whole), strict=True):
        axis = max(one.ndim - 4, 0)
        one, other = (np.moveaxis(np.asarray(x), axis, 0) for x in (one, other))
        for row in range(2):
            pages = slice(row * 32, row * 32 + 6)
            np.testing.assert_allclose(one[pages], other[pages], atol=2e-5)


def test_a_prompt_that_fills_its_row_to_the_end_is_extended_within_it():
    own, plain = engine(max_length=80), engine(pages=0, max_length=80)
    prompt = tiny.prompt(79, seed=2)
    sampling = dataclasses.replace(GREEDY, max_new_tokens=1)
    list(own.generate([Request(prompt_token_ids=prompt[:42], sampling=sampling)]))
    # The rest is 38 tokens, which are padded to 48: eight more than the row has.
    whole = Request(prompt_token_ids=prompt, sampling=sampling)
    assert token_ids(own, [whole]) == token_ids(plain, [whole])
    assert own.report.cached_prompt_tokens == 40


def test_a_prefix_cache_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="prefix_cache_pages=-1 must be 0 or more"):
        engine(pages=-1)
    with pytest.raises(ValueError, match="prefix_cache_pages=12 must be a multiple of 8"):
        engine(pages=12, slots=8, mesh=sharding.make_mesh(data=8))
    # 196 bytes a position, see `test_an_engine_that_cannot_be_is_refused`.
    needed = 196 * (64 * (512 + 384) + 512 + 64 * 10)
    fitting = {"slots": 64, "max_length": 512, "page_size": 64, "pages": 10}
    engine(**fitting, memory_bytes=needed)
    with pytest.raises(ValueError, match="slots=64 .* or a smaller prefix_cache_pages"):
        engine(**fitting, memory_bytes=needed - 1)


class _Copies(Programs):
    """The programs over host arrays: a page holds all tokens up to its end."""

    page_size = 2

    def __init__(self):
        """Takes no model."""

    def allocate(self, *, num_pages):
        return Cache((), (), np.full((num_pages, 1), None, object))

    def insert(self, cache, source, sources_M, targets_M):
        for page, place in zip(sources_M, targets_M, strict=True):
            if place >= 0:
                cache.tokens_PS[place] = source.tokens_PS[page]
        return cache


def test_found_pages_hold_their_tokens_whatever_was_kept_and_pushed_out():
    generator, width, size = np.random.default_rng(0), 6, _Copies.page_size
    programs, pushed_out = _Copies(), 0
    prefixes = PrefixCache(programs, num_pages=8, pages_per_row=width)
    used = []  # The prefixes that are kept, in the order of their last use.

    def use(tokens):
        for end in range(len(tokens) // size * size, 0, -size):
            prefix = tuple(tokens[:end])
            if prefix in used:
                used.remove(prefix)
            used.append(prefix)

    for _ in range(600):
        tokens = generator.integers(0, 2, generator.integers(0, width * size + 1)).tolist()
        places = prefixes.find(tokens)
        prompts = prefixes.restore(programs.allocate(num_pages=3 * width), 1, places)
        held = prompts.tokens_PS[width : 2 * width, 0].tolist()
        ends = [size * (index + 1) for index in range(len(places))]
        assert held == [tuple(tokens[:end]) for end in ends] + [None] * (width - len(places))
        whole = range(size, len(tokens) + 1, size)
        assert ends == [end for end in whole if tuple(tokens[:end]) in used]
        if places:
            use(tokens[: ends[-1]])
        source = programs.allocate(num_pages=width)
        for index in range(len(tokens) // size):
            source.tokens_PS[index, 0] = tuple(tokens[: size * (index + 1)])
        prefixes.keep(tokens, source, range(width))
        use(tokens)
        pushed_out += len(used[:-8])
        del used[:-8]
    assert pushed_out > 600
