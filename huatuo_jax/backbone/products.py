"""Matrix products with gradients of their own, in the order that transposes least.

What jax derives for a kernel's gradient is the transpose of `outputs^T inputs`: on CPU the widest
array of a layer is then copied into another layout. Here it is `inputs^T outputs`, as it is wanted.
"""

import functools
from collections.abc import Callable

import jax
from jax.typing import DTypeLike


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def linear(
    inputs: jax.Array, kernel: jax.Array, num_contracted: int, dtype: DTypeLike
) -> jax.Array:
    """Sums over the last dimensions of the inputs and the first ones of the kernel.

    Args:
        inputs: `[..., *contracted]`.
        kernel: `[*contracted, ...]`, in the dtype of the inputs.
        num_contracted: how many dimensions are summed over.
        dtype: of the sums, at least as wide.
    """
    return _linear_forward(inputs, kernel, num_contracted, dtype)[0]


def _linear_forward(
    inputs: jax.Array, kernel: jax.Array, num_contracted: int, dtype: DTypeLike
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # The product itself, not another call of `linear`: remat policies do not look into those.
    lead = inputs.ndim - num_contracted
    dims = tuple(range(lead, inputs.ndim)), tuple(range(num_contracted))
    outputs = jax.lax.dot_general(inputs, kernel, (dims, ((), ())), preferred_element_type=dtype)
    return outputs, (inputs, kernel)


def _linear_backward(
    num_contracted: int,
    dtype: DTypeLike,
    saved: tuple[jax.Array, jax.Array],
    gradient: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    inputs, kernel = saved
    lead = tuple(range(inputs.ndim - num_contracted))
    made = tuple(range(len(lead), gradient.ndim)), tuple(range(num_contracted, kernel.ndim))
    to_inputs = jax.lax.dot_general(
        gradient, kernel, (made, ((), ())), preferred_element_type=dtype
    )
    to_kernel = jax.lax.dot_general(
        inputs, gradient, ((lead, lead), ((), ())), preferred_element_type=dtype
    )
    return to_inputs.astype(inputs.dtype), to_kernel.astype(kernel.dtype)


linear.defvjp(_linear_forward, _linear_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gated(
    activation: Callable[[jax.Array], jax.Array], gate: jax.Array, up: jax.Array
) -> jax.Array:
    """`activation(gate) * up`; nothing but the two is kept for the backward pass."""
    return activation(gate) * up


def _gated_forward(
    activation: Callable[[jax.Array], jax.Array], gate: jax.Array, up: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return activation(gate) * up, (gate, up)


def _gated_backward(
    activation: Callable[[jax.Array], jax.Array],
    saved: tuple[jax.Array, jax.Array],
    gradient: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    gate, up = saved
    activated, pull_back = jax.vjp(activation, gate)
    return pull_back(gradient * up)[0], gradient * activated


gated.defvjp(_gated_forward, _gated_backward)
