"""A tiny backbone, tokenizers, files and a mesh that the tests of several rooms share."""

import dataclasses
import json

import jax
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from huatuo_jax.backbone.config import BackboneConfig
from huatuo_jax.core import sharding
from huatuo_jax.data import SAMPLE_FOLDER

TOKENIZER = str(SAMPLE_FOLDER / "tokenizer")  # Of 2048 tokens.

BACKBONE = BackboneConfig(
    family="llama",
    vocab_size=2048,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=16,
    max_positions=256,
)


def backbone(**changed):
    """The tiny backbone with other fields."""
    return dataclasses.replace(BACKBONE, **changed)


# Grouped heads, and a vocabulary with padded rows.
GROUPED = backbone(
    vocab_size=51,
    vocab_multiple=16,
    hidden_size=16,
    intermediate_size=24,
    num_heads=4,
    head_dim=6,
    max_positions=64,
    initializer_range=0.3,
)


def one_device():
    """A mesh of one device."""
    return sharding.make_mesh(devices=jax.devices()[:1])


def byte_level_tokenizer(texts, *, vocab_size, special_tokens=(), **named):
    """A byte-level BPE tokenizer trained on texts; `named` are such as `eos_token="</s>"`."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, **named)


def write_rows(path, records):
    """Writes records, or objects with `to_json`, as JSON Lines; returns the path as text."""
    rows = [one if isinstance(one, dict) else one.to_json() for one in records]
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return str(path)
