"""The decoder-only transformer of every family: embedding, stacked layers, a head.

Used as pure functions over a plain nested dict of parameters:

    model = Transformer(cfg, compute)
    params = init_params(key, cfg, compute)
    hidden_BTD = model.apply({"params": params}, tokens_BT)
    logits_BTV = model.apply({"params": params}, hidden_BTD, method="logits")
"""

import dataclasses
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from huatuo_jax.backbone import layers, positions
from huatuo_jax.backbone.blockwise_attention import Trees
from huatuo_jax.backbone.config import BackboneConfig, ComputeConfig
from huatuo_jax.backbone.layers import Attend, FeedForward, Norm, Rows, SelfAttention
from huatuo_jax.backbone.lora import LoraConfig, shared_with_adapters
from huatuo_jax.core import sharding

Head = Literal["lm", "score"]

_BLOCK_OUTPUTS = ("attention_output", "feed_forward_output")


class Layer(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    cfg: BackboneConfig
    compute: ComputeConfig
    lora: LoraConfig | None

    @nn.compact
    def __call__(
        self, hidden_BTD: jax.Array, rows: Rows, attend: Attend | None = None
    ) -> tuple[jax.Array, Any]:
        """Returns the residual stream after this layer, and the result of `attend` (or None).

        Args:
            hidden_BTD: the residual stream.
            rows: its tokens' places in their rows.
            attend: see `layers.Attend`; by default rows attend to themselves.
        """
        cfg, compute = self.cfg, self.compute
        attention_norm = Norm(cfg.norm, cfg, compute, name="attention_norm")
        mlp_norm = Norm(cfg.norm, cfg, compute, name="mlp_norm")
        normed_BTD = shared_with_adapters(attention_norm.recomputed(hidden_BTD), self.lora)
        attention = SelfAttention(cfg, compute, self.lora, name="attention")
        attended_BTD, returned = attention(normed_BTD, rows, attend)
        hidden_BTD = rows.wanted(hidden_BTD) + checkpoint_name(attended_BTD, _BLOCK_OUTPUTS[0])
        normed_BTD = shared_with_adapters(mlp_norm.recomputed(hidden_BTD), self.lora)
        fed_BTD = FeedForward(cfg, compute, self.lora, name="mlp")(normed_BTD)
        hidden_BTD = hidden_BTD + checkpoint_name(fed_BTD, _BLOCK_OUTPUTS[1])
        return sharding.constrain(hidden_BTD, "hidden_BTD"), returned


class Transformer(nn.Module):
    """A backbone and its head.

    Attributes:
        cfg: the architecture.
        compute: dtypes, kernels and rematerialisation.
        lora: the adapters that it may be applied with.
    """

    cfg: BackboneConfig
    compute: ComputeConfig = ComputeConfig()
    lora: LoraConfig | None = None

    def setup(self) -> None:
        """Names the parts; parameters are made by the parts that are used."""
        cfg, compute = self.cfg, self.compute
        self.embedding = Embedding(cfg, compute)
        if cfg.embedding_norm:
            self.embedding_norm = Norm(cfg.norm, cfg, compute)
        self.layers = nn.scan(
            _rematerialised(Layer, compute),
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=cfg.num_layers,
        )(cfg, compute, self.lora)
        self.final_norm = Norm(cfg.norm, cfg, compute)
        if not cfg.tie_embeddings:
            self.lm_head = layers.LmHead(cfg, compute)
        self.score_head = layers.ScoreHead(cfg, compute)

    def __call__(
        self,
        tokens_BT: jax.Array,
        *,
        segment_ids_BT: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the trunk's output after the final norm.

        Args:
            tokens_BT: token ids below `vocab_size`.
            segment_ids_BT: tokens see their own segment only; 0 for padding, on either side. None
                for one segment a row.
            positions_BT: by default they start at 0 in each segment.

        Returns:
            `[B, T, D]` in the compute dtype; values at padding have no meaning.
        """
        return self.trunk(
            self.embed(tokens_BT), segment_ids_BT=segment_ids_BT, positions_BT=positions_BT
        )

    def embed(self, tokens_BT: jax.Array) -> jax.Array:
        """Returns embeddings `[B, T, D]`, normalised in families that do so."""
        hidden_BTD = self.embedding(tokens_BT)
        if self.cfg.embedding_norm:
            hidden_BTD = self.embedding_norm(hidden_BTD)
        return sharding.constrain(hidden_BTD, "hidden_BTD")

    def trunk(
        self,
        embedded_BTD: jax.Array,
        *,
        segment_ids_BT: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
    ) -> jax.Array:
        """Applies the layers and the final norm to embeddings; arguments as for a call."""
        if positions_BT is None:
            if segment_ids_BT is None:
                positions_T = jnp.arange(embedded_BTD.shape[1], dtype=jnp.int32)
                positions_BT = jnp.broadcast_to(positions_T[None, :], embedded_BTD.shape[:2])
            else:
                positions_BT = positions.positions_from_segments(segment_ids_BT)
        hidden_BTD, _ = self.layers(embedded_BTD, self.rows(positions_BT, segment_ids_BT))
        return self.normalise(hidden_BTD)

    def at_places(
        self,
        tokens_BT: jax.Array,
        places_BP: jax.Array,
        *,
        positions_BT: jax.Array,
        subtree_ends_BT: jax.Array,
    ) -> jax.Array:
        """Returns the trunk's output for some tokens of rows of trees, `[B, P, D]`.

        The last layer's feed-forward is computed for them alone.

        Args:
            tokens_BT: token ids below `vocab_size`.
            places_BP: int32, the indices of the tokens in their rows.
            positions_BT: the depths of the tokens, see `blockwise_attention.Trees`.
            subtree_ends_BT: see there.
        """
        layer = Layer(self.cfg, self.compute, self.lora, parent=None)
        stacked = self.layers.variables
        rows = self.rows(positions_BT)._replace(trees=Trees(positions_BT, subtree_ends_BT))

        def apply(index: jax.Array | int, hidden_BTD: jax.Array, rows: Rows) -> jax.Array:
            own = jax.tree.map(
                lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), stacked
            )
            return layer.apply(own, hidden_BTD, rows)[0]

        last = self.cfg.num_layers - 1
        hidden_BTD = jax.lax.fori_loop(
            0, last, lambda index, hidden_BTD: apply(index, hidden_BTD, rows), self.embed(tokens_BT)
        )
        return self.normalise(apply(last, hidden_BTD, rows._replace(places_BP=places_BP)))

    def rows(self, positions_BT: jax.Array, segment_ids_BT: jax.Array | None = None) -> Rows:
        """Returns segments and rotations for the layers."""
        cos_BTH = sin_BTH = None
        if self.cfg.rope is not None:
            cos_BTH, sin_BTH = positions.rotary_tables(
                positions_BT,
                self.cfg.rope,
                head_dim=self.cfg.head_dim,
                dtype=self.compute.compute_dtype,
            )
        return Rows(segment_ids_BT, cos_BTH, sin_BTH)

    def normalise(self, hidden_BTD: jax.Array) -> jax.Array:
        """Applies the final norm to the layers' output."""
        return self.final_norm(hidden_BTD)

    def head(self, *, gather: bool = True) -> layers.Head:
        """Returns the head, for logits of many chunks; see `layers.head_of`."""
        table_or_kernel = self.embedding.table() if self.cfg.tie_embeddings else self.lm_head()
        return layers.head_of(
            table_or_kernel,
            self.cfg,
            self.compute,
            gather=gather,
            by_output=self._head_is_by_output(),
        )

    def logits(self, hidden_BTD: jax.Array, head: layers.Head | None = None) -> jax.Array:
        """Returns next-token logits `[B, T, V]`; padded rows hold `layers.PADDED_LOGIT`.

        Args:
            hidden_BTD: output of the trunk.
            head: by default made for this product alone.
        """
        if head is None:
            head = self.head(gather=False)
        return layers.project_to_vocabulary(
            hidden_BTD, head, self.cfg, self.compute, by_output=self._head_is_by_output()
        )

    def scores(self, hidden_BTD: jax.Array) -> jax.Array:
        """Returns one score for each token, `[B, T]`: rewards or values."""
        return self.score_head(hidden_BTD)

    def _head_is_by_output(self) -> bool:
        return self.cfg.tie_embeddings or self.lm_head.is_by_output


class Embedding(nn.Module):
    """The table of token embeddings."""

    cfg: BackboneConfig
    compute: ComputeConfig

    def setup(self) -> None:
        """Makes the table."""
        self.table_VD = self.param(
            "table",
            nn.initializers.normal(self.cfg.initializer_range),
            (self.cfg.padded_vocab_size, self.cfg.hidden_size),
            self.compute.param_dtype,
        )

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """Returns rows `[B, T, D]` of the table; an id outside the vocabulary gives NaN."""
        # A negative id would count from the end, and one in the padding would select a row.
        known_BT = (tokens_BT >= 0) & (tokens_BT < self.cfg.vocab_size)
        rows_BT = jnp.where(known_BT, tokens_BT, self.cfg.padded_vocab_size)
        # Each device looks up its own columns for all tokens, and sends them to where their rows
        # are. Tokens are less to send than the table, whose gradient stays where it is, too.
        rows_BT = sharding.constrain(rows_BT, "looked_up_BT")
        # Cast afterwards, so that the whole table is never copied.
        found_BTD = jnp.take(self.table_VD, rows_BT, axis=0, mode="fill")
        found_BTD = sharding.constrain(found_BTD.astype(self.compute.compute_dtype), "found_BTD")
        return sharding.constrain(found_BTD, "hidden_BTD")

    def table(self) -> jax.Array:
        """Returns the table `[V, D]`, for a tied head."""
        return self.table_VD


def init_params(
    key: jax.Array, cfg: BackboneConfig, compute: ComputeConfig, *, head: Head = "lm"
) -> dict[str, Any]:
    """Makes fresh parameters, normal with `initializer_range` but for norms (1) and biases (0).

    Args:
        key: PRNG key.
        cfg: the architecture.
        compute: gives the dtype.
        head: `lm` for logits, `score` for rewards or values.

    Returns:
        A plain nested dict; layers are stacked along their first axis.
    """
    assert head in get_args(Head), head
    # Parameters do not depend on the compute dtype, for which products may ask for the devices.
    model = Transformer(cfg, dataclasses.replace(compute, compute_dtype=jnp.float32))
    tokens_BT = jnp.zeros((1, 2), dtype=jnp.int32)

    def forward(module: Transformer) -> jax.Array:
        hidden_BTD = module(tokens_BT)
        return module.logits(hidden_BTD) if head == "lm" else module.scores(hidden_BTD)

    return model.init(key, method=forward)["params"]


def abstract_params(
    cfg: BackboneConfig, compute: ComputeConfig, *, head: Head = "lm"
) -> dict[str, Any]:
    """Returns the tree of `init_params` as `jax.ShapeDtypeStruct`, without making an array."""
    return jax.eval_shape(lambda: init_params(jax.random.key(0), cfg, compute, head=head))


def count_parameters(params: Any) -> int:
    """Counts the numbers in a tree of parameters, padded vocabulary rows included."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _rematerialised(layer: type[nn.Module], compute: ComputeConfig) -> type[nn.Module]:
    """Wraps the layer so that its backward pass recomputes according to `compute.remat`."""
    if compute.remat == "none":
        return layer
    policies = {
        "full": jax.checkpoint_policies.nothing_saveable,
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        "outputs": jax.checkpoint_policies.save_only_these_names(*_BLOCK_OUTPUTS),
    }
    # A scan's body is never merged with its recomputation, so the guard against that is not needed.
    return nn.remat(layer, policy=policies[compute.remat], prevent_cse=False)
