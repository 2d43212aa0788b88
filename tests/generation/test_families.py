"""Greedy answers of every family against transformers, and against the PyTorch reference."""

import numpy as np
import pytest
import torch

from huatuo_jax.backbone.config import ComputeConfig
from huatuo_jax.backbone.transformer import Transformer
from huatuo_jax.checkpoint.models import find_model, load_params
from huatuo_jax.generation.engine import Engine
from huatuo_jax.generation.requests import Request, SamplingConfig
from tests.generation.tiny import full_logits, log_softmax, prompt
from tests.hf import baichuan_reference, tiny_checkpoints

PROMPT_LENGTHS = (1, 23, 9, 40, 17)
MAX_LENGTH = 256
TIE = 1e-4
TRANSFORMERS_CASES = tuple(tiny_checkpoints.TRANSFORMERS_CASES)
BAICHUAN_CASES = {
    "baichuan_7b": {"alibi": False, "norm_head": False},
    "baichuan2_7b": {"alibi": False, "norm_head": True},
    "baichuan2_13b": {"alibi": True, "norm_head": True, "num_heads": 6},
}


def prompts():
    return [
        [3 + token for token in prompt(length, seed=length, vocab_size=128)]
        for length in PROMPT_LENGTHS
    ]


def our_answers(folder, num_tokens, *, split_layers=True):
    """Greedy answers through the engine with fewer slots than prompts, and the model."""
    found = find_model(folder)
    model = Transformer(found.cfg, ComputeConfig(query_chunk=64))
    variables = {"params": load_params(found)}
    engine = Engine(model, variables, slots=3, max_length=MAX_LENGTH, split_layers=split_layers)
    sampling = SamplingConfig(max_new_tokens=num_tokens, temperature=0.0)
    requests = [Request(prompt_token_ids=ids, sampling=sampling) for ids in prompts()]
    answers = [group[0] for group in engine.generate_in_order(requests)]
    return model, variables, answers


def assert_log_probs_of_full_pass(model, variables, answers):
    sequences = [ids + answer.token_ids for ids, answer in zip(prompts(), answers, strict=True)]
    logits = full_logits(sequences, model=model, weights=variables)
    for ids, answer, logits_TV in zip(prompts(), answers, logits, strict=True):
        rows_TV = log_softmax(logits_TV[len(ids) - 1 : -1])
        full_T = rows_TV[np.arange(len(answer.token_ids)), answer.token_ids]
        np.testing.assert_allclose(answer.log_probs, full_T, atol=1e-5)


def assert_same_up_to_ties(ours, theirs, logits_of):
    """The ids agree, or the two best logits where they first differ are tied; counts the ties."""
    ties = 0
    for ids, our_ids, their_ids in zip(prompts(), ours, theirs, strict=True):
        assert len(our_ids) == len(their_ids)
        differs = np.flatnonzero(np.array(our_ids) != np.array(their_ids))
        if differs.size:
            first = int(differs[0])
            best = np.sort(logits_of(ids + their_ids[:first]))[-2:]
            assert best[1] - best[0] <= TIE, f"ids differ at token {first} without a tie"
            ties += 1
    assert ties <= 1


def compare_with_transformers(case, num_tokens, tmp_path, **options):
    further = {} if case.startswith("bloom") else {"max_position_embeddings": MAX_LENGTH}
    reference = tiny_checkpoints.transformers_model(case, **further)
    folder = tiny_checkpoints.save(reference, tmp_path / "hf")
    model, variables, answers = our_answers(folder, num_tokens, **options)
    width = max(PROMPT_LENGTHS)
    padded_BT = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts()])
    mask_BT = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts()])
    reference.generation_config.eos_token_id = None
    generated_BT = reference.generate(
        padded_BT,
        attention_mask=mask_BT,
        max_new_tokens=num_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    theirs = generated_BT[:, width:].tolist()

    def logits_of(ids):
        with torch.no_grad():
            return reference(torch.tensor([ids])).logits[0, -1].numpy()

    assert_same_up_to_ties([answer.token_ids for answer in answers], theirs, logits_of)
    assert_log_probs_of_full_pass(model, variables, answers)
    assert all(answer.finish_reason == "length" for answer in answers)


def compare_with_baichuan(case, num_tokens, tmp_path):
    reference = baichuan_reference.Baichuan(**BAICHUAN_CASES[case])
    folder = reference.save(tmp_path / "hf")
    length_field = "model_max_length" if reference.alibi else "max_position_embeddings"
    tiny_checkpoints.edit_config(folder, **{length_field: MAX_LENGTH})
    model, variables, answers = our_answers(folder, num_tokens)

    def logits_of(ids):
        return reference.logits(ids)[-1].numpy()

    theirs = []
    for ids in prompts():
        answer = []
        for _ in range(num_tokens):
            answer.append(int(logits_of(ids + answer).argmax()))
        theirs.append(answer)
    assert_same_up_to_ties([answer.token_ids for answer in answers], theirs, logits_of)
    assert_log_probs_of_full_pass(model, variables, answers)


@pytest.mark.parametrize(
    "case",
    [
        "llama",
        *(pytest.param(one, marks=pytest.mark.slow) for one in ("mistral", "bloom", "qwen3")),
    ],
)
def test_short_greedy_answers_equal_those_of_transformers(case, tmp_path):
    compare_with_transformers(case, 30, tmp_path)


@pytest.mark.slow
def test_greedy_answers_with_scanned_layers_equal_those_of_transformers(tmp_path):
    compare_with_transformers("qwen2", 30, tmp_path, split_layers=False)


def test_short_greedy_answers_equal_those_of_the_baichuan_reference(tmp_path):
    compare_with_baichuan("baichuan2_13b", 20, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", TRANSFORMERS_CASES)
def test_greedy_answers_equal_those_of_transformers(case, tmp_path):
    compare_with_transformers(case, 200, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", BAICHUAN_CASES)
def test_greedy_answers_equal_those_of_the_baichuan_reference(case, tmp_path):
    compare_with_baichuan(case, 200, tmp_path)


def test_dynamic_rope_is_refused_past_its_original_length(tmp_path):
    folder = tiny_checkpoints.save(
        tiny_checkpoints.transformers_model("llama_dynamic"), tmp_path / "hf"
    )
    # The checkpoint's positions end at 16 too; a longer context alone does not make it right.
    found = find_model(folder)
    model = Transformer(found.cfg.__class__.from_dict(found.cfg.to_dict() | {"max_positions": 64}))
    with pytest.raises(ValueError, match="cached decoding to 64 tokens does not work.*dynamic"):
        Engine(model, {"params": load_params(found)}, slots=1, max_length=64)
