"""Attention on a CPU: time against the pairs of tokens that attend, beside PyTorch's.

Rows are packed with segments of one length; a token sees the tokens of its segment up to itself.
The table has, for each length of segments, the time of a pair in units of the time of a pair where
a row is one segment: 1 where time is proportional to the pairs that attend. Blocks on the edge of
a segment are computed whole, so the table also has the pairs that are computed. PyTorch's SDPA
takes a causal flag for rows of one segment, and a mask for packed ones.

    python benchmarks/attention.py
"""

import functools
import json
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import contest
import jax
import jax.numpy as jnp
import numpy as np
import torch
from absl import app, flags

from huatuo_jax.backbone.attention import attend
from huatuo_jax.backbone.config import ComputeConfig

_SEGMENTS = flags.DEFINE_list("segments", [64, 128, 256, 512, 1024], "Tokens of a segment.")
_SHAPES = flags.DEFINE_list(
    "shapes",
    ["4x1024x4x64", "2x2048x4x64", "4x1024x2x128", "32x128x4x64"],
    "Rows x tokens of a row x heads x width of a head.",
)
_CHUNK = flags.DEFINE_integer("query_chunk", ComputeConfig().query_chunk, "Tokens of a block.")
_REPEATS = flags.DEFINE_integer("repeats", 7, "Calls, of which the median counts.")
_OUTPUT = flags.DEFINE_string("output", "benchmarks/results/attention_cpu.json", "Where to.")

Figures = dict[str, Any]


def main(_: list[str]) -> None:
    """Measures every shape, prints tables, writes the result."""
    torch.set_num_threads(contest.THREADS.value)
    found: Figures = contest.machine(("jax", "jaxlib", "torch"))
    found["query_chunk"], found["shapes"] = _CHUNK.value, {}
    for shape in _SHAPES.value:
        found["shapes"][shape] = measure(*map(int, shape.split("x")))
        print_table(shape, found["shapes"][shape])
    pathlib.Path(_OUTPUT.value).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def measure(rows: int, length: int, num_heads: int, head_dim: int) -> list[Figures]:
    """One line for each length of segments, the whole row last."""
    generator = np.random.default_rng(0)
    shape = (rows, length, num_heads, head_dim)
    arrays = [generator.normal(size=shape).astype(np.float32) for _ in range(4)]
    sizes = [size for size in map(int, _SEGMENTS.value) if size < length]
    lines = [measure_segments(arrays, size) for size in (*sizes, length)]
    for line in lines:
        for name in ("forward_ms", "forward_backward_ms"):
            a_pair, a_pair_of_whole = (
                each[name] / each["attended_pairs"] for each in (line, lines[-1])
            )
            line[name.replace("_ms", "_ratio")] = a_pair / a_pair_of_whole
    return lines


def measure_segments(arrays: list[np.ndarray], size: int) -> Figures:
    """Ours and PyTorch's times for rows of segments of one length."""
    rows, length = arrays[0].shape[:2]
    segments_BT = np.broadcast_to(np.arange(length, dtype=np.int32) // size + 1, (rows, length))
    tensors = [torch.tensor(array).transpose(1, 2) for array in arrays]
    mask = None
    if size < length:
        mask = torch.tensor(segments_BT[0][:, None] == segments_BT[0]).tril()
    ours, theirs = ours_on(arrays, segments_BT), torch_on(tensors, mask)
    return {
        "segment": size,
        "attended_pairs": rows * pairs(length, size),
        "computed_pairs": rows * computed_pairs(length, size, _CHUNK.value),
        "forward_ms": ours[0],
        "forward_backward_ms": ours[1],
        "torch_forward_ms": theirs[0],
        "torch_forward_backward_ms": theirs[1],
    }


def ours_on(arrays: list[np.ndarray], segments_BT: np.ndarray) -> tuple[float, float]:
    """Milliseconds of our forward pass, and of it with the backward pass."""
    function = functools.partial(
        attend,
        segment_ids_BT=jnp.asarray(segments_BT),
        sliding_window=None,
        alibi_slopes_N=None,
        kernel="xla",
        query_chunk=_CHUNK.value,
    )

    def both(q: jax.Array, k: jax.Array, v: jax.Array, cotangent: jax.Array) -> Any:
        output, backward = jax.vjp(function, q, k, v)
        return output, *backward(cotangent)

    inputs = [jnp.asarray(array) for array in arrays]
    forward, both = jax.jit(function), jax.jit(both)
    return (
        milliseconds(lambda: jax.block_until_ready(forward(*inputs[:3]))),
        milliseconds(lambda: jax.block_until_ready(both(*inputs))),
    )


def torch_on(tensors: list[Any], mask: Any) -> tuple[float, float]:
    """The same of PyTorch's SDPA."""
    q, k, v, cotangent = tensors
    leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    sdpa = functools.partial(
        torch.nn.functional.scaled_dot_product_attention, attn_mask=mask, is_causal=mask is None
    )

    def forward() -> None:
        with torch.no_grad():
            sdpa(q, k, v)

    return (
        milliseconds(forward),
        milliseconds(lambda: torch.autograd.grad(sdpa(*leaves), leaves, cotangent)),
    )


def milliseconds(call: Callable[[], Any]) -> float:
    """The median time of some calls, after two that are not counted."""
    times = []
    for _ in range(_REPEATS.value + 2):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[2:])


def pairs(length: int, size: int) -> int:
    """Pairs of a row that attend; a last segment may be shorter."""
    return sum(n * (n + 1) // 2 for n in (*[size] * (length // size), length % size))


def computed_pairs(length: int, size: int, chunk: int) -> int:
    """Pairs of a row in blocks that a query sees anything of."""
    block = -(-length // -(-length // chunk))
    blocks = range(-(-length // block))
    return sum((i - (i * block // size * size) // block + 1) * block**2 for i in blocks)


def print_table(shape: str, lines: list[Figures]) -> None:
    """One line for each length of segments."""
    print(f"\n{shape}: milliseconds, and time of a pair relative to rows of one segment")
    heads = ("segment", "pairs", "computed", "forward", "ratio", "both", "ratio", "torch", "both")
    print("".join(f"{head:>11}" for head in heads))
    for line in lines:
        cells = (
            f"{line['segment']}",
            f"{line['attended_pairs']}",
            f"{line['computed_pairs'] / line['attended_pairs']:.2f}",
            f"{line['forward_ms']:.1f}",
            f"{line['forward_ratio']:.2f}",
            f"{line['forward_backward_ms']:.1f}",
            f"{line['forward_backward_ratio']:.2f}",
            f"{line['torch_forward_ms']:.1f}",
            f"{line['torch_forward_backward_ms']:.1f}",
        )
        print("".join(f"{cell:>11}" for cell in cells))


if __name__ == "__main__":
    app.run(main)
