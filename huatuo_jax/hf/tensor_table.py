"""The one table between our parameters and the tensors of Hugging Face checkpoints.

A rule names, for one of our parameters, the tensors of one layer that it is made of, and joins
them; the inverse splits it again, bit for bit. PyTorch stores a linear map as `[out, in]`, we
store `[in, out]` with separate dimensions.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence

import numpy as np

from huatuo_jax.backbone.config import BackboneConfig
from huatuo_jax.backbone.transformer import Head

Arrays = Sequence[np.ndarray]
Shape = tuple[int, ...]

# Buffers in old checkpoints that follow from the config.
LEGACY_BUFFERS = (r"rotary_emb\.inv_freq", r"rotary_emb\.(cos|sin)_cached")
SCORE_WEIGHT = "score.weight"
_LEGACY = re.compile(rf"(^|\.)({'|'.join(LEGACY_BUFFERS)})$")


@dataclasses.dataclass(frozen=True)
class TensorRule:
    """The mapping between tensors of a checkpoint and one parameter.

    Attributes:
        path: the parameter, `layers/mlp/down/kernel`.
        names: the tensors, with `{layer}` if there is one a layer.
        shapes: of the tensors.
        join: from the tensors to the parameter (to one layer's part of it).
        split: the inverse of `join`.
    """

    path: str
    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    join: Callable[[Arrays], np.ndarray]
    split: Callable[[np.ndarray], Arrays]

    @property
    def stacked(self) -> bool:
        """Returns whether the parameter stacks one part a layer."""
        return "{layer}" in self.names[0]


def is_legacy_buffer(name: str) -> bool:
    """Returns whether a checkpoint's tensor is a buffer that is ignored."""
    return _LEGACY.search(name) is not None


def tensor_rules(
    cfg: BackboneConfig, layout: str, head: Head, *, labels: int = 1
) -> tuple[TensorRule, ...]:
    """Returns the table for one backbone.

    Args:
        cfg: the backbone.
        layout: the `model_type` whose names and shapes the checkpoint has.
        head: `lm` for a causal language model, `score` for a sequence classifier.
        labels: of the classifier; of two, the score is the difference of the logits.
    """
    if layout == "bloom":
        rules = _bloom_rules(cfg)
    elif layout == "baichuan":
        rules = _llama_rules(cfg, _packed_qkv(cfg))
    else:
        rules = _llama_rules(cfg, _separate_qkv(cfg))
    if head == "score":
        return (*rules, _score_head(cfg.hidden_size, labels))
    if cfg.tie_embeddings:
        return tuple(rules)
    return (*rules, _vocabulary("lm_head/kernel", "lm_head.weight", cfg, transposed=True))


def _llama_rules(cfg: BackboneConfig, qkv: Sequence[TensorRule]) -> list[TensorRule]:
    width, hidden, layer = cfg.intermediate_size, cfg.hidden_size, "model.layers.{layer}."
    heads = (cfg.num_heads, cfg.head_dim)
    rules = [
        _vocabulary("embedding/table", "model.embed_tokens.weight", cfg, transposed=False),
        *qkv,
        _linear(
            "layers/attention/output/kernel",
            layer + "self_attn.o_proj.weight",
            heads,
            (hidden,),
        ),
        _pair("layers/mlp/gate_up/kernel", layer + "mlp.{}_proj.weight", (width, hidden)),
        _linear("layers/mlp/down/kernel", layer + "mlp.down_proj.weight", (width,), (hidden,)),
        _vector("layers/attention_norm/scale", layer + "input_layernorm.weight", (hidden,)),
        _vector("layers/mlp_norm/scale", layer + "post_attention_layernorm.weight", (hidden,)),
        _vector("final_norm/scale", "model.norm.weight", (hidden,)),
    ]
    if cfg.qk_norm:
        for ours, theirs in (("query", "q"), ("key", "k")):
            path = f"layers/attention/{ours}_norm/scale"
            rules.append(_vector(path, f"{layer}self_attn.{theirs}_norm.weight", (cfg.head_dim,)))
    if cfg.output_bias:
        path = "layers/attention/output/bias"
        rules.append(_vector(path, layer + "self_attn.o_proj.bias", (hidden,)))
    if cfg.mlp_bias:
        rules.append(_pair("layers/mlp/gate_up/bias", layer + "mlp.{}_proj.bias", (width,)))
        rules.append(_vector("layers/mlp/down/bias", layer + "mlp.down_proj.bias", (hidden,)))
    return rules


def _bloom_rules(cfg: BackboneConfig) -> list[TensorRule]:
    width, hidden, layer = cfg.intermediate_size, cfg.hidden_size, "transformer.h.{layer}."
    # BLOOM interleaves query, key and value head by head, as we do for one query a key.
    heads, block = (cfg.num_heads, cfg.head_dim), (cfg.num_heads, 3 * cfg.head_dim)
    attention = layer + "self_attention."
    rules = [
        _vocabulary("embedding/table", "transformer.word_embeddings.weight", cfg, transposed=False),
        _linear(
            "layers/attention/qkv/kernel",
            attention + "query_key_value.weight",
            (hidden,),
            block,
        ),
        _vector("layers/attention/qkv/bias", attention + "query_key_value.bias", block),
        _linear("layers/attention/output/kernel", attention + "dense.weight", heads, (hidden,)),
        _vector("layers/attention/output/bias", attention + "dense.bias", (hidden,)),
        _linear("layers/mlp/up/kernel", layer + "mlp.dense_h_to_4h.weight", (hidden,), (width,)),
        _vector("layers/mlp/up/bias", layer + "mlp.dense_h_to_4h.bias", (width,)),
        _linear("layers/mlp/down/kernel", layer + "mlp.dense_4h_to_h.weight", (width,), (hidden,)),
        _vector("layers/mlp/down/bias", layer + "mlp.dense_4h_to_h.bias", (hidden,)),
    ]
    norms = {
        "embedding_norm": "transformer.word_embeddings_layernorm",
        "layers/attention_norm": layer + "input_layernorm",
        "layers/mlp_norm": layer + "post_attention_layernorm",
        "final_norm": "transformer.ln_f",
    }
    for ours, theirs in norms.items():
        rules.append(_vector(f"{ours}/scale", f"{theirs}.weight", (hidden,)))
        rules.append(_vector(f"{ours}/bias", f"{theirs}.bias", (hidden,)))
    return rules


def _separate_qkv(cfg: BackboneConfig) -> list[TensorRule]:
    """Maps q_proj, k_proj and v_proj."""
    names = tuple(f"model.layers.{{layer}}.self_attn.{part}_proj.weight" for part in "qkv")
    rows = _qkv_rows(cfg)
    shapes = tuple((size, cfg.hidden_size) for size in rows)
    rules = [
        TensorRule(
            "layers/attention/qkv/kernel",
            names,
            shapes,
            lambda parts: _group_heads([part.T for part in parts], cfg),
            lambda ours: [part.T for part in _ungroup_heads(ours, cfg)],
        )
    ]
    if cfg.qkv_bias:
        biases = tuple(name.replace("weight", "bias") for name in names)
        rules.append(
            TensorRule(
                "layers/attention/qkv/bias",
                biases,
                tuple((size,) for size in rows),
                lambda parts: _group_heads(parts, cfg),
                lambda ours: _ungroup_heads(ours, cfg),
            )
        )
    return rules


def _packed_qkv(cfg: BackboneConfig) -> list[TensorRule]:
    """Maps Baichuan's W_pack: all queries, then all keys, then all values."""
    ends = np.cumsum(_qkv_rows(cfg))
    return [
        TensorRule(
            "layers/attention/qkv/kernel",
            ("model.layers.{layer}.self_attn.W_pack.weight",),
            ((int(ends[-1]), cfg.hidden_size),),
            lambda parts: _group_heads(np.split(parts[0].T, ends[:-1], axis=-1), cfg),
            lambda ours: [np.concatenate([part.T for part in _ungroup_heads(ours, cfg)])],
        )
    ]


def _qkv_rows(cfg: BackboneConfig) -> tuple[int, int, int]:
    keys = cfg.num_kv_heads * cfg.head_dim
    return cfg.num_heads * cfg.head_dim, keys, keys


def _group_heads(parts: Arrays, cfg: BackboneConfig) -> np.ndarray:
    """Joins queries `[..., N H]`, keys and values `[..., K H]` to `[..., K, M]`."""
    blocks = [part.reshape(*part.shape[:-1], cfg.num_kv_heads, -1) for part in parts]
    return np.concatenate(blocks, axis=-1)


def _ungroup_heads(ours: np.ndarray, cfg: BackboneConfig) -> Arrays:
    queries = cfg.queries_per_kv_head * cfg.head_dim
    blocks = np.split(ours, (queries, queries + cfg.head_dim), axis=-1)
    return [block.reshape(*block.shape[:-2], -1) for block in blocks]


def _linear(path: str, name: str, inputs: Shape, outputs: Shape) -> TensorRule:
    """Maps a matrix `[out, in]` to ours, `[*inputs, *outputs]`."""
    shape = (int(np.prod(outputs)), int(np.prod(inputs)))
    return TensorRule(
        path,
        (name,),
        (shape,),
        lambda parts: parts[0].T.reshape(*inputs, *outputs),
        lambda ours: [ours.reshape(shape[1], shape[0]).T],
    )


def _score_head(hidden: int, labels: int) -> TensorRule:
    """Maps the head of a classifier; that of two labels to its one score, which has no inverse."""
    one = _linear("score_head/kernel", SCORE_WEIGHT, (hidden,), (1,))
    if labels == 1:
        return one

    def difference(parts: Arrays) -> np.ndarray:
        first, second = parts[0].astype(np.float32)
        return (second - first)[:, None]

    return dataclasses.replace(one, shapes=((labels, hidden),), join=difference)


def _vector(path: str, name: str, shape: Shape) -> TensorRule:
    """Maps a bias or a norm's scale to a parameter with separate dimensions."""
    flat = (int(np.prod(shape)),)
    return TensorRule(
        path,
        (name,),
        (flat,),
        lambda parts: parts[0].reshape(shape),
        lambda ours: [ours.reshape(flat)],
    )


def _pair(path: str, name: str, shape: Shape) -> TensorRule:
    """Maps gate_proj and up_proj, side by side before the last dimension."""
    return TensorRule(
        path,
        (name.replace("{}", "gate"), name.replace("{}", "up")),
        (shape, shape),
        lambda parts: np.stack([part.T for part in parts], axis=-2),
        lambda ours: [ours[..., 0, :].T, ours[..., 1, :].T],
    )


def _vocabulary(path: str, name: str, cfg: BackboneConfig, *, transposed: bool) -> TensorRule:
    """Maps a tensor with one row a token; ours has zero rows up to the padded vocabulary."""
    padding = ((0, cfg.padded_vocab_size - cfg.vocab_size), (0, 0))

    def join(parts: Arrays) -> np.ndarray:
        padded = np.pad(parts[0], padding) if padding[0][1] else parts[0]
        return padded.T if transposed else padded

    def split(ours: np.ndarray) -> Arrays:
        return [(ours.T if transposed else ours)[: cfg.vocab_size]]

    return TensorRule(path, (name,), ((cfg.vocab_size, cfg.hidden_size),), join, split)
