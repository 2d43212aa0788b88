"""Tiny models of all forms, for the tests of the Python surface."""

import dataclasses

import jax

from huatuo_jax.backbone.config import ComputeConfig
from huatuo_jax.backbone.transformer import init_params
from huatuo_jax.checkpoint.models import save_orbax
from huatuo_jax.data import SAMPLE_FOLDER
from huatuo_jax.training.scoring import Normalization, save_normalization
from tests.tiny import BACKBONE

TOKENIZER = SAMPLE_FOLDER / "tokenizer"
NORMALIZATION = Normalization(
    mean=0.25, standard_deviation=0.5, num_answers=9, answers="nine answers"
)
QUESTION = "头痛三天了，怎么办？"
TURNS = [
    {"role": "user", "content": "咳嗽一周了。"},
    {"role": "assistant", "content": "有痰吗？"},
    {"role": "user", "content": "没有，晚上厉害。"},
]


def params(head, *, seed=1, backbone=BACKBONE):
    """Fresh weights, blown up so that answers and scores differ."""
    made = init_params(jax.random.key(seed), backbone, ComputeConfig(), head=head)
    return jax.tree.map(lambda leaf: leaf * 5 if leaf.ndim > 1 else leaf, made)


def save(folder, head, *, tokenizer=TOKENIZER, seed=1, **changed):
    backbone = dataclasses.replace(BACKBONE, **changed)
    made = params(head, seed=seed, backbone=backbone)
    save_orbax(made, backbone, folder, head=head, source_folder=tokenizer)
    if head == "score":
        save_normalization(folder, NORMALIZATION)
    return folder
