"""Which weights the forward pass casts before anything else, and those weights cast already."""

import re
from typing import Any

import jax
from jax.typing import DTypeLike

from huatuo_jax import sharding

# Norms and the score head are not among them: they are read in full width.
_CAST_IN_FORWARD = re.compile(
    r"(^|/)(embedding/table|lm_head/kernel"
    r"|(attention|mlp)/(qkv|output|gate_up|up|down)/(kernel|bias)|(attention|mlp)/\w+/[ab])$"
)


def store_as_computed(variables: Any, dtype: DTypeLike, *, keep_lm_head: bool = False) -> Any:
    """Variables that no gradient is taken of, as the forward pass casts them: it is unchanged.

    Args:
        variables: collections, or parts of them, layers stacked or split; arrays that are in the
            dtype already are handed back as they are.
        dtype: the compute dtype.
        keep_lm_head: leave the head alone: NormHead scales it in full width before the cast.
    """

    def stored(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        name = sharding.path_name(path)
        if not _CAST_IN_FORWARD.search(name) or (keep_lm_head and name.endswith("lm_head/kernel")):
            return leaf
        return leaf if leaf.dtype == dtype else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(stored, variables)
