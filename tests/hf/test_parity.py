"""Our backbone against transformers, and against a PyTorch reference where it has no class."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from huatuo_jax.backbone.config import ComputeConfig
from huatuo_jax.backbone.transformer import Transformer
from huatuo_jax.checkpoint.models import find_model, load_params
from tests.hf import baichuan_reference, tiny_checkpoints

LENGTHS = (40, 23, 1)
TOLERANCE = 1e-4  # of the logits' range


def rows(padding_side):
    """Tokens, mask: rows of unequal length, padded on one side."""
    generator = np.random.default_rng(3)
    tokens_BT = np.zeros((len(LENGTHS), max(LENGTHS)), dtype=np.int32)
    mask_BT = np.zeros_like(tokens_BT)
    for row, length in enumerate(LENGTHS):
        place = slice(0, length) if padding_side == "right" else slice(-length, None)
        tokens_BT[row, place] = generator.integers(3, 131, length)
        mask_BT[row, place] = 1
    return tokens_BT, mask_BT


def our_outputs(folder, tokens_BT, mask_BT, method):
    """Logits or scores of a checkpoint through our backbone, in float32 at full precision."""
    model = find_model(folder)
    params = load_params(model)
    module = Transformer(model.cfg, ComputeConfig(query_chunk=16))

    @jax.jit
    def forward(params, tokens_BT, mask_BT):
        hidden_BTD = module.apply({"params": params}, tokens_BT, segment_ids_BT=mask_BT)
        return module.apply({"params": params}, hidden_BTD, method=method)

    with jax.default_matmul_precision("highest"):
        outputs = np.asarray(forward(params, jnp.asarray(tokens_BT), jnp.asarray(mask_BT)))
    return outputs[..., : model.cfg.vocab_size] if method == "logits" else outputs


def assert_close(ours, theirs, mask_BT):
    ours, theirs = ours[mask_BT == 1], theirs[mask_BT == 1]
    assert np.abs(ours - theirs).max() <= TOLERANCE * (theirs.max() - theirs.min())


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("case", tiny_checkpoints.TRANSFORMERS_CASES)
def test_logits_equal_those_of_transformers(case, padding_side, tmp_path):
    reference = tiny_checkpoints.transformers_model(case)
    folder = tiny_checkpoints.save(reference, tmp_path / "hf")
    tokens_BT, mask_BT = rows(padding_side)
    positions_BT = np.maximum(mask_BT.cumsum(1) - 1, 0)
    inputs = {"input_ids": tokens_BT, "attention_mask": mask_BT}
    if not case.startswith("bloom"):
        inputs["position_ids"] = positions_BT
    with torch.no_grad():
        theirs = reference(**{name: torch.tensor(x) for name, x in inputs.items()}).logits
    ours = our_outputs(folder, tokens_BT, mask_BT, "logits")
    assert_close(ours, theirs.numpy(), mask_BT)


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("norm_head", [False, True])
@pytest.mark.parametrize(("alibi", "num_heads"), [(False, 6), (True, 6), (True, 8)])
def test_logits_equal_those_of_the_baichuan_reference(
    alibi, num_heads, norm_head, padding_side, tmp_path
):
    reference = baichuan_reference.Baichuan(alibi=alibi, norm_head=norm_head, num_heads=num_heads)
    folder = reference.save(tmp_path / "hf")
    tokens_BT, mask_BT = rows(padding_side)
    theirs_BTV = np.zeros((*tokens_BT.shape, 131), dtype=np.float32)
    for row, mask_T in enumerate(mask_BT == 1):
        theirs_BTV[row, mask_T] = reference.logits(tokens_BT[row, mask_T].tolist()).numpy()
    assert_close(our_outputs(folder, tokens_BT, mask_BT, "logits"), theirs_BTV, mask_BT)


@pytest.mark.parametrize("case", ["llama", "mistral", "qwen2", "qwen3", "bloom"])
def test_scores_equal_those_of_transformers(case, tmp_path):
    reference = tiny_checkpoints.transformers_model(case, head="score")
    folder = tiny_checkpoints.save(reference, tmp_path / "hf")
    tokens_BT, mask_BT = rows("right")
    with torch.no_grad():
        theirs_B = reference(
            input_ids=torch.tensor(tokens_BT), attention_mask=torch.tensor(mask_BT)
        ).logits[:, 0]
    scores_BT = our_outputs(folder, tokens_BT, mask_BT, "scores")
    ours_B = scores_BT[np.arange(len(LENGTHS)), np.array(LENGTHS) - 1]
    np.testing.assert_allclose(ours_B, theirs_B.numpy(), rtol=1e-4, atol=1e-4)


def test_a_wrong_field_would_be_noticed(tmp_path):
    """The comparison can fail: other rotary angles change the logits past the tolerance."""
    reference = tiny_checkpoints.transformers_model("llama")
    folder = tiny_checkpoints.save(reference, tmp_path / "hf")
    tokens_BT, mask_BT = rows("right")
    right = our_outputs(folder, tokens_BT, mask_BT, "logits")
    config_theta = {"rope_parameters": {"rope_type": "default", "rope_theta": 9_000.0}}
    tiny_checkpoints.edit_config(folder, **config_theta)
    wrong = our_outputs(folder, tokens_BT, mask_BT, "logits")
    with pytest.raises(AssertionError):
        assert_close(wrong, right, mask_BT)


def test_the_vocabulary_multiple_of_a_config_changes_no_logit(tmp_path):
    folder = tiny_checkpoints.save(tiny_checkpoints.transformers_model("qwen2"), tmp_path / "hf")
    model = find_model(folder)
    tokens_BT = jnp.arange(8, dtype=jnp.int32)[None, :]
    logits = []
    for multiple in (1, 128):
        cfg = dataclasses.replace(model.cfg, vocab_multiple=multiple)
        params = load_params(dataclasses.replace(model, cfg=cfg))
        module = Transformer(cfg)
        hidden_BTD = module.apply({"params": params}, tokens_BT)
        logits.append(module.apply({"params": params}, hidden_BTD, method="logits")[..., :131])
    np.testing.assert_array_equal(*logits)
