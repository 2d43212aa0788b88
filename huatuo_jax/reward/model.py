"""The model a reward stage trains: a backbone from disk or fresh, and a scalar head on it."""

import dataclasses
import functools
import math
import pathlib
from typing import Any

import jax
from jax.sharding import Mesh

from huatuo_jax.backbone import lora
from huatuo_jax.backbone.casting import store_as_computed
from huatuo_jax.backbone.lora import init_adapters
from huatuo_jax.backbone.transformer import Transformer, init_params
from huatuo_jax.checkpoint import models
from huatuo_jax.training.initial_model import InitialModel
from huatuo_jax.training.optimizer import Optimizer
from huatuo_jax.training.state import (
    TrainState,
    Variables,
    abstract,
    join,
    make_sharded,
    new_state,
    split,
)

# Folded into the run's key, as in `training.initial_model`.
_ADAPTERS_ROLE = 1
_HEAD_ROLE = 2
_HEADS = ("lm_head", "score_head")


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitialRewardModel:
    """A reward model to start from; its weights are not read before `make_state`.

    Attributes:
        base: the backbone, from a model with a token head or a score head, or fresh.
        head_init: a fresh head gives scores of about this standard deviation. A model from disk
            that has a score head keeps it.
        head_only: train the head and nothing else.
    """

    base: InitialModel
    head_init: float
    head_only: bool

    def make_state(self, key: jax.Array, optimizer: Optimizer, mesh: Mesh) -> TrainState:
        """The state before the first step, in its shards.

        Raises:
            ValueError: the weights on disk are not those of the config, or a dimension does not
                divide over the mesh.
            OSError: they cannot be read.
        """

        def build(key: jax.Array, params: Variables) -> TrainState:
            return self._state(key, params, optimizer)

        base = self.base
        if base.info is None:
            return make_sharded(lambda key: build(key, self._fresh(key)), mesh, key)
        params = models.load_params(base.info, mesh=mesh, dtype=base.compute.param_dtype)
        params.pop("lm_head", None)
        return make_sharded(build, mesh, key, params, donated=(1,))

    def abstract_state(self, optimizer: Optimizer, mesh: Mesh) -> TrainState:
        """That state's shapes and shardings."""
        return abstract(
            lambda key: self._state(key, self._fresh(key), optimizer), mesh, jax.random.key(0)
        )

    @property
    def transformer(self) -> Transformer:
        """The module its variables belong to."""
        return Transformer(self.base.cfg, self.base.compute, self.base.section.lora)

    def is_trained(self, path: str) -> bool:
        """Whether the variable at a path such as `params/embedding/table` is trained."""
        if path.startswith("params/score_head/"):
            return True
        return not self.head_only and self.base.is_trained(path)

    def merged(self, variables: Variables) -> dict[str, Any]:
        """The parameters with the adapters' updates added to them."""
        adapters = self.base.section.lora
        params: dict[str, Any] = variables["params"]
        if adapters is None:
            return params
        merge = functools.partial(lora.merge, cfg=self.base.cfg, lora=adapters)
        return jax.jit(merge)(params, variables["lora"])

    def save(self, variables: Variables, target: pathlib.Path) -> None:
        """Writes the model as a directory of ours, adapters merged, with the tokenizer's files."""
        tokenizer = pathlib.Path(self.base.section.tokenizer_source)
        models.save_orbax(
            self.merged(variables),
            self.base.cfg,
            target,
            head="score",
            source_folder=tokenizer if tokenizer.is_dir() else None,
            overwrite=True,
        )

    def _fresh(self, key: jax.Array) -> Variables:
        params = init_params(key, self.base.cfg, self.base.compute, head="score")
        return {name: leaf for name, leaf in params.items() if name not in _HEADS}

    def _head(self, key: jax.Array) -> Variables:
        """A fresh head; the trunk's output has mean square 1 and `hidden_size` parts, or nearly."""
        cfg = self.base.cfg
        scale = self.head_init / math.sqrt(cfg.hidden_size)
        role = jax.random.fold_in(key, _HEAD_ROLE)
        dtype = self.base.compute.param_dtype
        return {"kernel": scale * jax.random.normal(role, (cfg.hidden_size, 1), dtype)}

    def _state(self, key: jax.Array, params: Variables, optimizer: Optimizer) -> TrainState:
        base = self.base
        if "score_head" not in params:
            params = params | {"score_head": self._head(key)}
        variables: Variables = {"params": params}
        if base.section.lora is not None:
            role = jax.random.fold_in(key, _ADAPTERS_ROLE)
            variables["lora"] = init_adapters(role, base.cfg, base.section.lora)
        if base.section.frozen_as_computed:
            trained, frozen = split(variables, self.is_trained)
            variables = join(trained, store_as_computed(frozen, base.compute.compute_dtype))
        return new_state(variables, is_trained=self.is_trained, optimizer=optimizer, key=key)
