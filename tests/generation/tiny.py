"""A tiny model of our own for tests of the engine, and the plain way to score its answers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from huatuo_jax.backbone.config import ComputeConfig
from huatuo_jax.backbone.transformer import Transformer, abstract_params
from huatuo_jax.generation.engine import Engine
from huatuo_jax.generation.requests import Request, SamplingConfig
from tests.tiny import GROUPED

CFG = dataclasses.replace(GROUPED, max_positions=512)
MODEL = Transformer(CFG)


def config(**changed):
    return dataclasses.replace(CFG, **changed)


@functools.cache
def variables(cfg=CFG):
    """Random everywhere: fresh biases and norms would hide a mistake in them."""
    generator = np.random.default_rng(0)
    shapes = abstract_params(cfg, ComputeConfig())
    return {
        "params": jax.tree.map(
            lambda x: jnp.asarray(generator.normal(size=x.shape) * 0.3, dtype=jnp.float32), shapes
        )
    }


def engine(*, slots=4, max_length=96, model=MODEL, **options):
    return Engine(model, variables(model.cfg), slots=slots, max_length=max_length, **options)


def prompt(length, *, seed=0, vocab_size=CFG.vocab_size):
    return np.random.default_rng(seed).integers(0, vocab_size, length).tolist()


def request(length, *, seed=0, num_answers=1, vocab_size=CFG.vocab_size, **sampling):
    return Request(
        prompt_token_ids=prompt(length, seed=seed, vocab_size=vocab_size),
        sampling=SamplingConfig(**sampling),
        seed=seed,
        num_answers=num_answers,
    )


@functools.partial(jax.jit, static_argnames="model")
def _logits(model, variables, tokens_BT):
    hidden_BTD = model.apply(variables, tokens_BT)
    return model.apply(variables, hidden_BTD, method="logits")


def full_logits(sequences, *, model=MODEL, weights=None):
    """Logits of whole sequences, without a cache; one array `[T, V]` a sequence."""
    weights = variables(model.cfg) if weights is None else weights
    tokens_BT = np.zeros((len(sequences), max(map(len, sequences))), dtype=np.int32)
    for row, sequence in enumerate(sequences):
        tokens_BT[row, : len(sequence)] = sequence
    logits_BTV = np.asarray(_logits(model, weights, jnp.asarray(tokens_BT)))
    return [logits_BTV[row, : len(sequence)] for row, sequence in enumerate(sequences)]


def log_softmax(scores_TV):
    scores_TV = np.asarray(scores_TV, dtype=np.float64)
    scores_TV = scores_TV - scores_TV.max(axis=-1, keepdims=True)
    return scores_TV - np.log(np.exp(scores_TV).sum(axis=-1, keepdims=True))
