"""A training state as named arrays: one path for each leaf, and what differs between two sets."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class LeafKind:
    """What a leaf is, without its values; `dtype` of a typed random key is like `key<fry>`."""

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        """Returns the form used in messages, `(2, 8) float32`."""
        return f"{self.shape} {self.dtype}"


def named_leaves(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by path, `optimizer/0/mu/layers/qkv/kernel`, in tree order.

    Fields of named tuples and dataclasses go by their name, elements of lists by their index.

    Raises:
        ValueError: the tree is a single leaf or has none, a name is empty or holds a slash, or two
            leaves would have the same path.
    """
    named: dict[str, Any] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        names = [jax.tree_util.keystr((key,), simple=True) for key in keys]
        path = "/".join(names)
        if not names:
            raise ValueError("state: must be a tree of arrays (a dict, say), it is a single leaf")
        if any(not name or "/" in name for name in names):
            raise ValueError(f"state: {path!r} has a name that is empty or holds a slash")
        if path in named:
            raise ValueError(f"state: two leaves are named {path!r}")
        named[path] = leaf
    if not named:
        raise ValueError("state: must hold at least one array, it holds none")
    return named


def nested(named: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the dict of dicts whose paths are the given ones."""
    tree: dict[str, Any] = {}
    for path, leaf in named.items():
        *folders, name = path.split("/")
        below = tree
        for folder in folders:
            below = below.setdefault(folder, {})
        below[name] = leaf
    return tree


def is_random_key(leaf: Any) -> bool:
    """Tells a typed random key (`jax.random.key`), concrete or abstract, from other leaves."""
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and bool(jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key))


def kind_of(leaf: Any) -> LeafKind:
    """Returns the kind of an array, an abstract array, or a Python or NumPy number."""
    if not hasattr(leaf, "shape"):
        leaf = np.asarray(leaf)
    return LeafKind(shape=tuple(leaf.shape), dtype=str(leaf.dtype))


def mismatches(
    saved: Mapping[str, LeafKind], wanted: Mapping[str, LeafKind], *, partial: bool
) -> list[str]:
    """Lists the paths that differ, as `layers/qkv/kernel: saved (2, 8), wanted (2, 16)`.

    With `partial`, what is saved and not wanted is passed over.
    """
    lines = []
    for path in sorted(saved.keys() | wanted.keys()):
        if path not in saved:
            lines.append(f"{path}: not saved, wanted {wanted[path]}")
        elif path not in wanted:
            if not partial:
                lines.append(f"{path}: saved {saved[path]}, not wanted")
        elif saved[path] != wanted[path]:
            lines.append(f"{path}: {_contrast(saved[path], wanted[path])}")
    return lines


def _contrast(saved: LeafKind, wanted: LeafKind) -> str:
    """Names only what differs: the shapes, the dtypes, or both."""
    if saved.dtype == wanted.dtype:
        return f"saved {saved.shape}, wanted {wanted.shape}"
    if saved.shape == wanted.shape:
        return f"saved {saved.dtype}, wanted {wanted.dtype}"
    return f"saved {saved}, wanted {wanted}"
