import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from huatuo_jax.backbone.config import ComputeConfig
from huatuo_jax.backbone.layers import KERNEL_BY_OUTPUT
from huatuo_jax.backbone.lora import LoraConfig, init_adapters, merge
from huatuo_jax.backbone.transformer import Transformer
from huatuo_jax.generation.engine import Engine
from huatuo_jax.generation.requests import Request, SamplingConfig
from tests.generation import tiny


@pytest.fixture(scope="module")
def engine():
    return tiny.engine()


def ids_of(answers):
    return [answer.token_ids for answer in answers]


def test_log_probs_are_those_of_the_full_forward_pass(engine):
    requests = [
        tiny.request(1, seed=1, max_new_tokens=30, temperature=0.7),
        tiny.request(33, seed=2, max_new_tokens=40, top_k=5, top_p=0.9),
        tiny.request(20, seed=3, max_new_tokens=9, repetition_penalty=1.5, min_p=0.1),
    ]
    for request, (answer,) in zip(requests, engine.generate_in_order(requests), strict=True):
        start, sampling = len(request.prompt_token_ids), request.sampling
        sequence = [*request.prompt_token_ids, *answer.token_ids]
        (logits_TV,) = tiny.full_logits([sequence])
        logits_TV = logits_TV[start - 1 : -1, : tiny.CFG.vocab_size]
        chosen = (np.arange(len(answer.token_ids)), answer.token_ids)
        plain_TV = tiny.log_softmax(logits_TV / sampling.temperature)
        np.testing.assert_allclose(answer.log_probs, plain_TV[chosen], atol=1e-5)
        processors = [
            transformers.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty),
            transformers.TemperatureLogitsWarper(sampling.temperature),
            transformers.TopKLogitsWarper(sampling.top_k or len(logits_TV[0])),
            transformers.TopPLogitsWarper(sampling.top_p),
            transformers.MinPLogitsWarper(sampling.min_p),
        ]
        filtered = []
        for step, logits_V in enumerate(logits_TV):
            scores = torch.tensor(logits_V[None])
            for processor in processors:
                scores = processor(torch.tensor([sequence[: start + step]]), scores)
            filtered.append(scores[0].numpy())
        sampling_TV = tiny.log_softmax(np.array(filtered))
        np.testing.assert_allclose(answer.sampling_log_probs, sampling_TV[chosen], atol=1e-5)


def test_answers_of_one_prompt_share_its_prefill_and_differ(engine):
    engine.reset_report()
    request = tiny.request(30, seed=7, num_answers=9, max_new_tokens=12)
    (answers,) = engine.generate_in_order([request])
    assert engine.report.prompt_tokens == 30
    assert [answer.answer_index for answer in answers] == list(range(9))
    assert len({tuple(ids) for ids in ids_of(answers)}) == 9
    one_more = engine.generate_in_order([dataclasses.replace(request, num_answers=10)])[0]
    assert ids_of(one_more)[:9] == ids_of(answers)


def test_a_stop_token_ends_an_answer_and_is_its_last_id(engine):
    free = tiny.request(8, seed=3, max_new_tokens=40)
    ((unbroken,),) = engine.generate_in_order([free])
    stop = unbroken.token_ids[10]
    first = unbroken.token_ids.index(stop)
    sampling = dataclasses.replace(free.sampling, stop_token_ids=(stop,))
    ((answer,),) = engine.generate_in_order([dataclasses.replace(free, sampling=sampling)])
    assert answer.token_ids == unbroken.token_ids[: first + 1]
    assert answer.finish_reason == "stop"
    assert len(answer.log_probs) == len(answer.sampling_log_probs) == first + 1
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (8, first + 1)
    assert unbroken.finish_reason == "length"


def test_no_stop_token_comes_before_the_minimum(engine):
    stops = tuple(range(0, 48, 3))
    request = tiny.request(
        5, num_answers=20, max_new_tokens=40, min_new_tokens=17, stop_token_ids=stops
    )
    (answers,) = engine.generate_in_order([request])
    assert min(map(len, ids_of(answers))) >= 18
    for answer in answers:
        assert not set(answer.token_ids[:17]) & set(stops)
        assert answer.token_ids[-1] in stops


def test_an_answer_ends_where_the_context_does(engine):
    request = tiny.request(90, max_new_tokens=500)
    ((answer,),) = engine.generate_in_order([request])
    assert len(answer.token_ids) == 6
    assert answer.finish_reason == "length"
    sequence = [*request.prompt_token_ids, *answer.token_ids]
    (logits_TV,) = tiny.full_logits([sequence])
    full_TV = tiny.log_softmax(logits_TV[89:-1])
    np.testing.assert_allclose(answer.log_probs, full_TV[np.arange(6), answer.token_ids], atol=1e-5)


def test_settings_and_lengths_compile_nothing_anew_within_a_bucket(engine):
    list(engine.generate([tiny.request(20, max_new_tokens=5), tiny.request(40)]))
    before = dict(engine.report.compilations)
    for length in (18, 24, 37):
        changed = {"temperature": 0.3, "top_k": 3, "stop_token_ids": (1, 2), "min_new_tokens": 2}
        list(engine.generate([tiny.request(length, max_new_tokens=length, **changed)]))
    assert engine.report.compilations == before
    assert sum(before.values()) <= engine.report.max_compilations


def test_new_weights_are_used_and_compile_nothing(engine):
    own = tiny.engine()
    request = tiny.request(12, max_new_tokens=8, temperature=0.0)
    ((before,),) = own.generate_in_order([request])
    compiled = dict(own.report.compilations)
    changed = jax.tree.map(lambda x: x[..., ::-1], tiny.variables())
    own.load(changed)
    ((after,),) = own.generate_in_order([request])
    assert own.report.compilations == compiled
    sequence = [*request.prompt_token_ids, *after.token_ids]
    (logits_TV,) = tiny.full_logits([sequence], weights=changed)
    assert logits_TV[11:-1].argmax(-1).tolist() == after.token_ids != before.token_ids


def test_an_engine_of_the_same_model_and_settings_compiles_nothing():
    requests = [tiny.request(length, max_new_tokens=5) for length in (20, 40)]

    def compiled(**settings):
        own = tiny.engine(**settings)
        assert own.generate_in_order(requests) == expected
        return own.report.compilations

    expected = tiny.engine().generate_in_order(requests)
    assert set(compiled(max_length=88)) == {"allocate", "prefill", "insert", "decode"}
    assert not compiled(max_length=88)
    assert set(compiled(max_length=80)) == {"allocate", "prefill", "insert", "decode"}


def test_answers_grow_through_no_sizes_of_a_cache_that_is_small_beside_the_weights(monkeypatch):
    model = Transformer(tiny.config(intermediate_size=8192))
    request = tiny.request(5, max_new_tokens=70, temperature=0.0)

    def answer_of_new_engine(max_length):
        own = tiny.engine(slots=2, max_length=max_length, page_size=8, model=model)
        return own.generate_in_order([request])[0][0], own.report.compilations

    answer, compilations = answer_of_new_engine(96)
    assert compilations["decode"] == 1 and "grow" not in compilations
    monkeypatch.setattr("huatuo_jax.generation.engine._FREE", 2**40)
    grown, compilations = answer_of_new_engine(88)  # Another length, whose programs are not there.
    assert compilations["decode"] == compilations["grow"] + 1 > 3
    assert grown.token_ids == answer.token_ids
    np.testing.assert_allclose(grown.log_probs, answer.log_probs, atol=1e-5)


def test_adapters_are_applied():
    lora = LoraConfig(rank=2, alpha=4.0)
    adapters = init_adapters(jax.random.key(1), tiny.CFG, lora)
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)  # `b` starts at zero
    request = tiny.request(12, seed=5, max_new_tokens=10, temperature=0.0)
    params = tiny.variables()["params"]
    merged = {"params": merge(params, adapters, tiny.CFG, lora)}
    plain = tiny.engine().generate_in_order([request])[0][0]
    expected = Engine(tiny.MODEL, merged, slots=2, max_length=64).generate_in_order([request])
    for split_layers in (True, False):
        adapted = Engine(
            Transformer(tiny.CFG, lora=lora),
            {"params": params, "lora": adapters},
            slots=2,
            max_length=64,
            split_layers=split_layers,
        ).generate_in_order([request])[0][0]
        assert adapted.token_ids == expected[0][0].token_ids != plain.token_ids
        np.testing.assert_allclose(adapted.log_probs, expected[0][0].log_probs, atol=1e-5)


def test_weights_of_the_right_dtype_are_not_copied_and_others_are_cast_once():
    variables = tiny.variables()
    own = Engine(tiny.MODEL, variables, slots=1, max_length=32, split_layers=False)
    pairs = zip(jax.tree.leaves(own._variables), jax.tree.leaves(variables), strict=True)
    assert all(
        ours.unsafe_buffer_pointer() == given.unsafe_buffer_pointer() for ours, given in pairs
    )
    half = Transformer(tiny.CFG, ComputeConfig(compute_dtype=jnp.bfloat16))
    own = Engine(half, variables, slots=2, max_length=32)
    layer = own._variables["params"]["layers"][0]
    assert layer["mlp"]["down"][KERNEL_BY_OUTPUT].dtype == jnp.bfloat16
    assert layer["mlp_norm"]["scale"].dtype == jnp.float32
    request = tiny.request(9, max_new_tokens=6)
    uncast = Engine(half, variables, slots=2, max_length=32, cast_weights=False)
    answers = [engine.generate_in_order([request])[0][0] for engine in (own, uncast)]
    assert ids_of(answers)[0] == ids_of(answers)[1]
    assert answers[0].log_probs == answers[1].log_probs


def test_an_abandoned_call_leaves_the_engine_ready(engine):
    answers = engine.generate([tiny.request(5, seed=seed, max_new_tokens=20) for seed in range(9)])
    next(answers)
    with pytest.raises(ValueError, match="still has unfinished answers"):
        engine.generate([tiny.request(5)])
    answers.close()
    assert not engine.busy
    assert len(list(engine.generate([tiny.request(5, max_new_tokens=3)]))) == 1


def test_requests_can_be_added_while_others_are_on_their_way(engine):
    alone = {
        seed: engine.generate_in_order([tiny.request(9, seed=seed, max_new_tokens=30)])[0][0]
        for seed in (1, 2)
    }
    first = engine.submit(tiny.request(9, seed=1, max_new_tokens=30))
    answers = engine.step()
    second = engine.submit(tiny.request(9, seed=2, max_new_tokens=30))
    while engine.busy:
        answers += engine.step()
    found = {answer.request_index: answer.token_ids for answer in answers}
    assert found == {first: alone[1].token_ids, second: alone[2].token_ids}


def test_an_aborted_request_frees_its_slots_and_leaves_the_others_alone(engine):
    wanted = tiny.request(9, seed=1, max_new_tokens=30)
    ((alone,),) = engine.generate_in_order([wanted])
    in_slots = engine.submit(tiny.request(9, seed=2, num_answers=3, max_new_tokens=40))
    kept = engine.submit(wanted)
    prefilled = engine.submit(tiny.request(9, seed=3, num_answers=6, max_new_tokens=40))
    queued = engine.submit(tiny.request(9, seed=4, max_new_tokens=40))
    engine.step()
    assert [one.request_index for one in engine.running] == [in_slots] * 3 + [kept]
    assert all(one.token_ids for one in engine.running)
    engine.abort(in_slots)
    engine.abort(in_slots)
    engine.abort(999)
    engine.step()
    assert [one.request_index for one in engine.running] == [prefilled] * 3 + [kept]
    engine.abort(queued)
    engine.abort(prefilled)
    answers = []
    while engine.busy:
        answers += engine.step()
    assert [(one.request_index, one.token_ids) for one in answers] == [(kept, alone.token_ids)]
    last = engine.submit(wanted)
    engine.step()
    engine.abort(last)
    assert not engine.busy
    assert ids_of(engine.generate_in_order([wanted])[0]) == [alone.token_ids]


@pytest.mark.parametrize(
    ("request_fields", "message"),
    [
        ({"prompt_token_ids": [3] * 96}, "96 tokens.*max_length=96.*shorten the prompt"),
        ({"prompt_token_ids": [3, 51]}, "holds 3 to 51; the model's vocabulary is 0 to 50"),
        ({"prompt_token_ids": [-1, 5]}, "holds -1 to 5"),
        (
            {"prompt_token_ids": [1], "sampling": SamplingConfig(stop_token_ids=(4, 77))},
            r"stop_token_ids has \[77\]",
        ),
        (
            {"prompt_token_ids": [1], "sampling": SamplingConfig(stop_token_ids=tuple(range(17)))},
            "17 ids, at most 16",
        ),
        (
            {"prompt_token_ids": [1], "sampling": SamplingConfig(stop_strings=("x",))},
            "need an engine with a tokenizer",
        ),
    ],
)
def test_a_request_that_cannot_be_answered_is_refused_before_decoding(
    engine, request_fields, message
):
    engine.reset_report()
    good = tiny.request(5)
    with pytest.raises(ValueError, match=rf"requests\[1\]: .*{message}"):
        engine.generate([good, Request(**request_fields)])
    assert engine.report.rounds == 0 and not engine.busy


def test_an_empty_prompt_and_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="prompt_token_ids is empty"):
        Request(prompt_token_ids=[])
    with pytest.raises(ValueError, match="seed=-1"):
        Request(prompt_token_ids=[1], seed=-1)
    wrong = {
        "temperature": -0.1,
        "top_p": 0.0,
        "top_k": -1,
        "min_p": 1.5,
        "repetition_penalty": 0.0,
        "max_new_tokens": 0,
        "min_new_tokens": 999,
        "stop_strings": ("",),
    }
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"SamplingConfig.{name}="):
            SamplingConfig(**{name: value})


def test_an_engine_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="max_length=513 must lie between 2 and the model's 512"):
        tiny.engine(max_length=513)
    with pytest.raises(ValueError, match="slots=0"):
        tiny.engine(slots=0)
    with pytest.raises(ValueError, match="page_size=0 must be above 0"):
        tiny.engine(page_size=0)
    # 2 layers x 2 heads x 6 wide x 2 x 4 bytes + 4 = 196 bytes a position. The last two sizes of
    # the pool, 512 and 384 pages of 64, and the prefix cache.
    needed = 196 * (64 * (512 + 384) + 512)
    tiny.engine(slots=64, max_length=512, memory_bytes=needed)
    with pytest.raises(ValueError, match="slots=64 .* 63 slots of that length would fit"):
        tiny.engine(slots=64, max_length=512, memory_bytes=needed - 1)
