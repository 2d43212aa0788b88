"""Compiles a decode step for a slice: bytes that it moves, and bytes that it has to, as JSON.

Of a model too large for a chip's on-chip memory, in which a small one's cache would lie.
"""

import json
import sys

import jax
import jax.numpy as jnp

from huatuo_jax.backbone.config import ComputeConfig, preset
from huatuo_jax.backbone.transformer import Transformer, abstract_params
from huatuo_jax.compiling import hlo
from huatuo_jax.compiling.costs import costs_of
from huatuo_jax.compiling.hardware import open_slice, prepare_environment
from huatuo_jax.core.sharding import MeshConfig
from huatuo_jax.generation import cache as caches
from huatuo_jax.generation.abstract import abstract_engine

SLOTS, LENGTH, TENSOR = 64, 2048, 2


def main(topology):
    """The program of all slots at their longest."""
    prepare_environment()
    backbone = preset("qwen2.5_1.5b")
    mesh = MeshConfig(data=-1, fsdp=1, tensor=TENSOR).make(open_slice(topology).devices)
    compute = ComputeConfig(compute_dtype="bfloat16")
    engine = abstract_engine(
        Transformer(backbone, compute),
        {"params": abstract_params(backbone, compute)},
        slots=SLOTS,
        max_length=LENGTH,
        mesh=mesh,
    )
    compiled = engine.programs.decode.lower(*engine.decode_arguments).compile()
    # In 16 bits; the head reads all of the table. The cache is split over all devices.
    weights = sum(2 * leaf.size for leaf in jax.tree.leaves(engine.decode_arguments[0]))
    kept = caches.num_bytes(backbone, positions=SLOTS * LENGTH, dtype=jnp.bfloat16)
    needed = engine.steps * (weights / TENSOR + kept / mesh.size)
    moved = costs_of(hlo.parse(compiled.as_text())).memory_bytes
    print(json.dumps({"moved": moved, "needed": needed}))


if __name__ == "__main__":
    main(sys.argv[1])
