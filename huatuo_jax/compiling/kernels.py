"""Calls that a program makes to kernels the compiler did not write: what they are and compute.

Splash attention (Pallas) on TPUs; cuDNN's attention and cuBLAS' matrix products on GPUs. Compiled
without a GPU, a program's products are Triton's, which are `dot`s within fusions: cuBLAS is taken
where it is faster, and that cannot be tried there.
"""

import math
import re

from huatuo_jax.compiling.hlo import Computation, Instruction, Module

_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_PALLAS = "tpu_custom_call"
_CUDNN_ATTENTION = "__cudnn$fmha"
_CUBLAS = ("__cublas$gemm", "__cublas$lt$matmul")
# Matrix products of a block of queries with a block of keys, or of the same size, in each of splash
# attention's kernels: scores and outputs; scores, their gradient, the queries'; those and the
# gradients of keys and values. cuDNN has all of the backward pass in one: scores once, and four.
_SPLASH_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}
_FLOATS = ("bf16", "f16", "f32")
_CUDNN_FORWARD, _CUDNN_BACKWARD = 2, 5
_CONTRACTED = re.compile(r'"lhs_contracting_dimensions":\s*\[([^\]]*)\]')


def splash_calls(module: Module) -> list[str]:
    """Names of splash attention's kernels among the program's instructions."""
    return sorted(one.name for one in _calls(module) if _is_splash(one))


def cudnn_calls(module: Module) -> list[str]:
    """Names of cuDNN's attention kernels among the program's instructions."""
    return sorted(one.name for one in _calls(module) if _target(one).startswith(_CUDNN_ATTENTION))


def attention_flops(one: Instruction, computation: Computation) -> float:
    """Of a call of an attention kernel, half of the scores being causal; 0 for other calls."""
    if _target(one).startswith(_CUDNN_ATTENTION):
        is_backward = _target(one).endswith("Backward")
        # Their first value is of the queries' shape: outputs, or the queries' gradient.
        return _attention(_CUDNN_BACKWARD if is_backward else _CUDNN_FORWARD, one.shapes[0].dims)
    if _target(one) != _PALLAS:
        return 0.0
    products = next((n for name, n in _SPLASH_PRODUCTS.items() if one.name.startswith(name)), 0)
    # The first operands may be blocks of the mask, of whole numbers. A batch of 1 is dropped.
    queries = next(
        (
            shape.dims
            for shape in computation.operand_shapes(one)
            if shape.dtype in _FLOATS and len(shape.dims) in (3, 4)
        ),
        None,
    )
    if queries is None:
        return 0.0
    return _attention(products, (1,) * (4 - len(queries)) + queries)


def cublas_flops(one: Instruction, computation: Computation) -> float:
    """Two for each multiplication and addition of a call of cuBLAS; 0 for other calls."""
    if _target(one) not in _CUBLAS:
        return 0.0
    found = _CONTRACTED.search(one.attributes)
    assert found is not None, one.attributes
    lhs = computation.operand_shapes(one)[0].dims
    contracted = math.prod(lhs[int(dim)] for dim in re.findall(r"\d+", found[1]))
    return 2.0 * math.prod(one.shapes[0].dims) * contracted


def _attention(products: int, queries_BNTH: tuple[int, ...]) -> float:
    batch, heads, length, width = queries_BNTH
    return products * 2.0 * batch * heads * (length * (length + 1) / 2) * width


def _calls(module: Module) -> set[Instruction]:
    return {
        one
        for place in module.places
        for one in place.computation.instructions.values()
        if one.opcode == "custom-call"
    }


def _is_splash(one: Instruction) -> bool:
    return _target(one) == _PALLAS and one.name.startswith("splash")


def _target(one: Instruction) -> str:
    found = _TARGET.search(one.attributes) if one.opcode == "custom-call" else None
    return found[1] if found else ""
