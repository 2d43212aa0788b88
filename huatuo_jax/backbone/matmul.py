"""Matrix products whose gradients transpose and keep least, and weights cast as they are read.

The gradient of a kernel that jax derives is the transpose of `outputs^T inputs`: on CPU the widest
array of a layer is then copied into another layout. Here it is `inputs^T outputs` directly. Inputs
that cost little to compute, as those behind a norm, are computed again in the backward pass.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from huatuo_jax.core import sharding

# Norms and the score head are not included: they are read in full width.
_CAST_IN_FORWARD = re.compile(
    r"(^|/)(embedding/table|lm_head/kernel"
    r"|(attention|mlp)/(qkv|output|gate_up|up|down)/(kernel|bias)|(attention|mlp)/\w+/[ab])$"
)
_Saved = tuple[jax.Array, jax.Array, jax.Array | None]
_Sources = tuple[jax.Array, ...]
_FEW_ROWS = 64  # Of a product whose result is turned; turning that of many rows costs more.


@dataclasses.dataclass(frozen=True)
class Recomputed:
    """An array that a backward pass computes again from its sources, which it keeps instead.

    A product with it, `linear`, keeps the sources alone. Anything else takes its value, and keeps
    of that what it needs.

    Attributes:
        compute: a function of the sources that costs little beside a product.
        sources: receive the gradients that jax derives from `compute`.
    """

    compute: Callable[..., jax.Array]
    sources: tuple[jax.Array, ...]

    @classmethod
    def of(cls, array: "jax.Array | Recomputed") -> "Recomputed":
        """Returns the argument; an array, which is kept, as its own source."""
        return array if isinstance(array, Recomputed) else cls(_same, (array,))

    def value(self) -> jax.Array:
        """Returns the array; its own gradients are computed from the sources."""
        return _value(self.compute, self.sources)


def linear(
    inputs: jax.Array | Recomputed,
    kernel: jax.Array,
    multiplied: jax.Array | None,
    num_contracted: int,
    dtype: DTypeLike,
    cuts: tuple[int, ...] = (),
    cut_dim: int = -1,
) -> tuple[jax.Array, ...]:
    """Sums over the last dimensions of the inputs and the first ones of the kernel.

    Args:
        inputs: `[..., *contracted]`; the backward pass keeps them, or their sources.
        kernel: `[*contracted, ...]`; receives the gradient, in its dtype.
        multiplied: the kernel in the dtype of the inputs, made once for many products, to which no
            gradient flows; None casts the kernel for each product, and keeps no copy.
        num_contracted: number of dimensions that are summed over.
        dtype: of the sums, at least as wide.
        cuts: indices at which the kernel is cut; each part has its own product. The backward pass
            keeps the whole kernel, which is in memory anyway, and not its parts.
        cut_dim: the kernel's dimension that is cut, counted from the end.

    Returns:
        The outputs of each part; one without cuts.
    """
    made = Recomputed.of(inputs)
    static = _Static(made.compute, num_contracted, dtype, cuts, cut_dim)
    return _linear(static, made.sources, kernel, multiplied)


def cut(array: jax.Array, cuts: tuple[int, ...], dim: int) -> list[jax.Array]:
    """Splits an array into its parts; without cuts, the array itself is the only one."""
    return jnp.split(array, cuts, axis=dim) if cuts else [array]


def store_as_computed(variables: Any, dtype: DTypeLike, *, keep_lm_head: bool = False) -> Any:
    """Casts variables without gradients as the forward pass would, which leaves it unchanged.

    Args:
        variables: collections, or parts of them, layers stacked or split; arrays that already have
            the dtype are returned as they are.
        dtype: the compute dtype.
        keep_lm_head: do not cast the head: NormHead scales it in full width before the cast.
    """

    def stored(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        name = sharding.path_name(path)
        if not _CAST_IN_FORWARD.search(name) or (keep_lm_head and name.endswith("lm_head/kernel")):
            return leaf
        return leaf if leaf.dtype == dtype else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(stored, variables)


def by_output(kernel: jax.Array, num_contracted: int) -> jax.Array:
    """Returns the kernel with the dimensions that are summed over last, for `linear_by_output`."""
    return jnp.moveaxis(kernel, range(num_contracted), range(-num_contracted, 0))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def linear_by_output(
    inputs: jax.Array,
    kernel: jax.Array,
    multiplied: jax.Array | None,
    num_contracted: int,
    dtype: DTypeLike,
) -> jax.Array:
    """Computes `linear` from a kernel as `by_output` returns it.

    On CPU a product of few rows takes less time, about half with a width of 512: each weight is
    read where it lies, while a kernel whose outputs lie beside each other is copied into another
    layout for every product.

    Args:
        inputs: `[B, T, *contracted]`.
        kernel: `[..., *contracted]`; receives the gradient, in its dtype and layout.
        multiplied: as for `linear`.
        num_contracted: number of dimensions that are summed over.
        dtype: of the sums, at least as wide.

    Returns:
        `[B, T, ...]`.
    """
    return _by_output_forward(inputs, kernel, multiplied, num_contracted, dtype)[0]


def _by_output_forward(
    inputs: jax.Array,
    kernel: jax.Array,
    multiplied: jax.Array | None,
    num_contracted: int,
    dtype: DTypeLike,
) -> tuple[jax.Array, _Saved]:
    saved = (inputs, kernel, multiplied)
    kernel = _read(saved)
    of_inputs = tuple(range(2, 2 + num_contracted))
    of_kernel = tuple(range(kernel.ndim - num_contracted, kernel.ndim))
    if inputs.shape[0] * inputs.shape[1] > _FEW_ROWS:
        dims = ((of_inputs, of_kernel), ((), ()))
        return _product(inputs, kernel, dims, dtype).astype(dtype), saved
    dims = ((of_kernel, of_inputs), ((), ()))
    outputs = _product(kernel, inputs, dims, dtype).astype(dtype)
    return jnp.moveaxis(outputs, (-2, -1), (0, 1)), saved


def _by_output_backward(
    num_contracted: int, dtype: DTypeLike, saved: _Saved, gradient: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    inputs, kernel, _ = saved
    made = tuple(range(2, gradient.ndim)), tuple(range(kernel.ndim - num_contracted))
    to_inputs = _product(gradient, _read(saved), (made, ((), ())), dtype)
    to_kernel = _over_tokens(gradient, inputs, num_lead=2)
    return to_inputs.astype(inputs.dtype), to_kernel.astype(kernel.dtype), None


linear_by_output.defvjp(_by_output_forward, _by_output_backward)


class _Static(NamedTuple):
    """Arguments of `linear` that are not arrays."""

    compute: Callable[..., jax.Array]
    num_contracted: int
    dtype: DTypeLike
    cuts: tuple[int, ...]
    cut_dim: int


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(
    static: _Static, sources: _Sources, kernel: jax.Array, multiplied: jax.Array | None
) -> tuple[jax.Array, ...]:
    return _linear_forward(static, sources, kernel, multiplied)[0]


def _linear_forward(
    static: _Static, sources: _Sources, kernel: jax.Array, multiplied: jax.Array | None
) -> tuple[tuple[jax.Array, ...], tuple[_Sources, jax.Array, jax.Array | None]]:
    # The product itself, not another call of `linear`: remat policies do not look into those.
    inputs, dtype = static.compute(*sources), static.dtype
    lead = inputs.ndim - static.num_contracted
    dims = tuple(range(lead, inputs.ndim)), tuple(range(static.num_contracted))
    outputs = tuple(
        _product(inputs, part, (dims, ((), ())), dtype).astype(dtype)
        for part in cut(_read((inputs, kernel, multiplied)), static.cuts, static.cut_dim)
    )
    return outputs, (sources, kernel, multiplied)


def _linear_backward(
    static: _Static,
    saved: tuple[_Sources, jax.Array, jax.Array | None],
    gradients: tuple[jax.Array, ...],
) -> tuple[_Sources, jax.Array, None]:
    sources, kernel, multiplied = saved
    inputs, pull_back = jax.vjp(static.compute, *sources)
    lead = inputs.ndim - static.num_contracted
    made = tuple(range(lead, gradients[0].ndim)), tuple(range(static.num_contracted, kernel.ndim))
    parts = cut(_read((inputs, kernel, multiplied)), static.cuts, static.cut_dim)
    from_parts = [
        _product(gradient, part, (made, ((), ())), static.dtype)
        for gradient, part in zip(gradients, parts, strict=True)
    ]
    to_parts = [_over_tokens(inputs, gradient, num_lead=lead) for gradient in gradients]
    to_kernel = jnp.concatenate(to_parts, axis=static.cut_dim) if static.cuts else to_parts[0]
    to_inputs = functools.reduce(jnp.add, from_parts)
    return pull_back(to_inputs.astype(inputs.dtype)), to_kernel.astype(kernel.dtype), None


_linear.defvjp(_linear_forward, _linear_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _value(compute: Callable[..., jax.Array], sources: _Sources) -> jax.Array:
    return compute(*sources)


def _value_forward(
    compute: Callable[..., jax.Array], sources: _Sources
) -> tuple[jax.Array, _Sources]:
    return compute(*sources), sources


def _value_backward(
    compute: Callable[..., jax.Array], sources: _Sources, gradient: jax.Array
) -> tuple[_Sources]:
    return (jax.vjp(compute, *sources)[1](gradient),)


_value.defvjp(_value_forward, _value_backward)


def _same(array: jax.Array) -> jax.Array:
    return array


def _read(saved: _Saved) -> jax.Array:
    """Returns the kernel as the inputs are multiplied by it."""
    inputs, kernel, multiplied = saved
    return kernel.astype(inputs.dtype) if multiplied is None else multiplied


def _over_tokens(left: jax.Array, right: jax.Array, *, num_lead: int) -> jax.Array:
    """Sums over the first dimensions of both, which are those of tokens.

    On CPU as a product of two matrices: with more dimensions XLA first copies the left factor into
    another layout, which makes the product take 15 to 75 % longer. 16-bit factors need the copy.

    Returns:
        The other dimensions of the left factor, then those of the right one, in the dtype of both,
        in which a mesh adds it up.
    """
    lead = tuple(range(num_lead))
    if left.dtype.itemsize < 4 or sharding.platform_in_use() != "cpu":
        return _product(left, right, ((lead, lead), ((), ())), left.dtype)
    num_tokens = math.prod(left.shape[:num_lead])
    of_left, of_right = left.shape[num_lead:], right.shape[num_lead:]
    left_nd = left.reshape(num_tokens, math.prod(of_left))
    right_ne = right.reshape(num_tokens, math.prod(of_right))
    summed_de = _product(left_nd, right_ne, (((0,), (0,)), ((), ())), left.dtype)
    return summed_de.reshape(*of_left, *of_right)


def _product(
    left: jax.Array, right: jax.Array, dims: jax.lax.DotDimensionNumbers, dtype: DTypeLike
) -> jax.Array:
    """Returns `jax.lax.dot_general` with sums in a dtype, on CPU in float32 at least.

    XLA:CPU multiplies bfloat16 as it is only where sums are float32. Asked for sums in bfloat16, it
    copies both factors to float32 first, and so each weight in every step.
    """
    wide = jnp.promote_types(dtype, jnp.float32)
    # The devices are asked for only where it matters, as that starts jax's backends.
    sums = wide if wide != dtype and sharding.platform_in_use() == "cpu" else dtype
    return jax.lax.dot_general(left, right, dims, preferred_element_type=sums)
