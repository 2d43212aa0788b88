"""Ten AdamW steps against PyTorch: transformers' Llama, its own AdamW, float64 on both sides."""

import functools
import math

import jax
import numpy as np
import torch
import transformers
from transformers.models.llama import modeling_llama

from huatuo_jax.backbone.config import ComputeConfig
from huatuo_jax.backbone.transformer import Transformer
from huatuo_jax.checkpoint.models import find_model, load_params
from huatuo_jax.core import sharding
from huatuo_jax.sft import token_loss
from huatuo_jax.training.loop import put_on_mesh
from huatuo_jax.training.optimizer import OptimizerConfig, make_optimizer
from huatuo_jax.training.update import compile_update, make_sharded, make_update, new_state
from tests.training.tiny import dialogues, rows_of

NUM_STEPS = 10
OPTIMIZER = OptimizerConfig(
    learning_rate=3e-3, warmup_steps=3, final_share=0.1, weight_decay=0.1, clip_norm=0.7
)
LLAMA = transformers.LlamaConfig(
    vocab_size=93,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.2,
    attn_implementation="sdpa",
)


def _in_full_width(monkeypatch):
    """Lifts the casts to float32 that transformers has in its norms and rotary angles."""

    def normalise(self, hidden):
        variance = hidden.pow(2).mean(-1, keepdim=True)
        return self.weight * hidden * torch.rsqrt(variance + self.variance_epsilon)

    def angles(self, x, position_ids):
        width = LLAMA.hidden_size // LLAMA.num_attention_heads
        frequencies = 10_000.0 ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
        turns = position_ids[..., None].double() * frequencies
        doubled = torch.cat((turns, turns), dim=-1)
        return doubled.cos(), doubled.sin()

    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", normalise)
    monkeypatch.setattr(modeling_llama.LlamaRotaryEmbedding, "forward", angles)


def _rate(update):
    """The schedule's closed form in plain Python."""
    warmup, peak, floor = OPTIMIZER.warmup_steps, OPTIMIZER.learning_rate, OPTIMIZER.final_share
    if update < warmup:
        return peak * (update + 1) / warmup
    share = (update - warmup) / (NUM_STEPS - warmup)
    return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * share)) / 2)


def _texts(step):
    lengths = np.random.default_rng(step).integers(5, 12, 8)
    return dialogues(lengths, seed=step)


def _train_in_torch(model):
    """One dialogue at a time, summed, divided by the trained tokens of the step."""
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    others = [p for name, p in model.named_parameters() if "norm" not in name]
    optimizer = torch.optim.AdamW(
        [{"params": others, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}],
        betas=(OPTIMIZER.beta1, OPTIMIZER.beta2),
        eps=OPTIMIZER.epsilon,
    )
    losses, norms_seen = [], []
    for step in range(NUM_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = _rate(step)
        optimizer.zero_grad()
        texts = _texts(step)
        terms = sum(int(trained[1:].sum()) for _, trained, _ in texts)
        total = 0.0
        for ids, trained, _ in texts:
            logits = model(torch.tensor(ids)[None]).logits[0, :-1]
            picked = logits.log_softmax(-1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
            loss = -(picked * torch.tensor(trained[1:])).sum() / terms
            loss.backward()
            total += loss.item()
        norms_seen.append(
            float(torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_norm))
        )
        losses.append(total)
        optimizer.step()
    return losses, norms_seen


def _train_in_jax(params, cfg):
    """The same dialogues, packed four a row, in two micro-batches."""
    wide = ComputeConfig(param_dtype="float64", compute_dtype="float64", output_dtype="float64")
    optimizer = make_optimizer(OPTIMIZER, num_steps=NUM_STEPS)
    mesh = sharding.make_mesh(fsdp=1, devices=jax.devices()[:1])

    def make(key):
        return new_state(
            {"params": params}, is_trained=lambda path: True, optimizer=optimizer, key=key
        )

    state = make_sharded(make, mesh, jax.random.key(0))
    loss = functools.partial(token_loss, Transformer(cfg, wide), chunk=16)
    update = compile_update(make_update(loss, optimizer, num_micro_batches=2), state, mesh)
    losses, norms = [], []
    for step in range(NUM_STEPS):
        texts = _texts(step)
        batch = rows_of([texts[:4], texts[4:]], row_length=48)
        state, metrics = update(state, put_on_mesh(batch, mesh))
        losses.append(float(metrics["loss"] / metrics["num_terms"]))
        norms.append(float(metrics["grad_norm"]))
    return state.trained["params"], losses, norms


def test_ten_steps_agree_with_pytorch_in_float64(tmp_path, monkeypatch):
    _in_full_width(monkeypatch)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(LLAMA).double()
    model.save_pretrained(tmp_path / "before")
    expected_losses, expected_norms = _train_in_torch(model)
    model.save_pretrained(tmp_path / "after")
    with jax.enable_x64(True):
        before = find_model(tmp_path / "before")
        params, losses, norms = _train_in_jax(load_params(before), before.cfg)
        expected = load_params(find_model(tmp_path / "after"))
        start = load_params(before)
        np.testing.assert_allclose(losses[0], expected_losses[0], rtol=1e-12)
        np.testing.assert_allclose(norms[0], expected_norms[0], rtol=1e-12)
        # From the first update on PyTorch differs a little: it clips by the norm plus 1e-6.
        np.testing.assert_allclose(losses, expected_losses, rtol=1e-7)
        np.testing.assert_allclose(norms, expected_norms, rtol=1e-7)
        assert min(norms) > OPTIMIZER.clip_norm, "no step was clipped"
        for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
            name = sharding.path_name(path)
            found, first = params, start
            for key in path:
                found, first = found[key.key], first[key.key]
            assert found.dtype == np.float64, name
            moved = np.abs(np.asarray(leaf) - np.asarray(first)).max()
            assert moved > 1e-3, f"{name} hardly moved"
            np.testing.assert_allclose(found, leaf, rtol=0, atol=1e-6, err_msg=name)
