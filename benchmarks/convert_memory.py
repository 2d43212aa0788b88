"""Peak host memory of converting a checkpoint, against its bound.

A synthetic LLaMA of about 1.5 GB in four shards is converted to Orbax and back, each in a process
of its own under `/usr/bin/time -v`. The bound: the destination's arrays, one stacked tensor, and
1 GiB for everything else (Python and jax among it).

    python benchmarks/convert_memory.py [--workdir=DIR]
"""

import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import numpy as np
from absl import app, flags

from huatuo_jax.backbone.config import BackboneConfig, ComputeConfig
from huatuo_jax.backbone.transformer import abstract_params
from huatuo_jax.hf.config import to_hugging_face
from huatuo_jax.hf.safetensors_files import TensorToWrite, write_safetensors
from huatuo_jax.hf.tensor_table import tensor_rules

_WORKDIR = flags.DEFINE_string("workdir", None, "Where to work; default: a temporary folder.")

ROOT = pathlib.Path(__file__).resolve().parents[1]
GIB = 2**30
CFG = BackboneConfig(
    family="llama",
    vocab_size=32_000,
    hidden_size=1536,
    intermediate_size=4096,
    num_layers=10,
    num_heads=12,
    num_kv_heads=12,
    head_dim=128,
    max_positions=2048,
)


def main(_: list[str]) -> None:
    """Make the checkpoint, convert it both ways, compare the peaks with the bound."""
    with tempfile.TemporaryDirectory(dir=_WORKDIR.value) as name:
        folder = pathlib.Path(name)
        size = make_checkpoint(folder / "hf")
        leaves = abstract_params(CFG, ComputeConfig())
        largest = max(math.prod(leaf.shape) * 4 for leaf in _leaves(leaves))
        bound = size + largest + GIB
        print(f"checkpoint {size / GIB:.2f} GiB, largest stacked tensor {largest / GIB:.2f} GiB")
        failed = False
        for source, target in (("hf", "orbax"), ("orbax", "back")):
            peak = peak_memory(folder / source, folder / target)
            failed |= peak > bound
            verdict = "within" if peak <= bound else "OVER"
            print(
                f"{source} to {target}: peak {peak / GIB:.2f} GiB, {verdict} the bound of "
                f"{bound / GIB:.2f} GiB"
            )
    sys.exit(1 if failed else 0)


def make_checkpoint(folder: pathlib.Path) -> int:
    """Write random weights tensor by tensor in four shards; their size in bytes."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    tensors = [
        TensorToWrite(
            name.replace("{layer}", str(layer)),
            shape,
            np.dtype(np.float32),
            lambda shape=shape: generator.standard_normal(shape, dtype=np.float32),
        )
        for rule in tensor_rules(CFG, "llama", "lm")
        for layer in range(CFG.num_layers if rule.stacked else 1)
        for name, shape in zip(rule.names, rule.shapes, strict=True)
    ]
    total = sum(tensor.num_bytes for tensor in tensors)
    write_safetensors(folder, tensors, max_shard_size=math.ceil(total / 4) + 2**25)
    shards = len(list(folder.glob("*.safetensors")))
    assert shards == 4, shards
    config = to_hugging_face(CFG, head="lm", dtype=np.dtype(np.float32))
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return total


def peak_memory(source: pathlib.Path, target: pathlib.Path) -> int:
    """Convert in a process of its own; its maximum resident set in bytes."""
    command = [sys.executable, str(ROOT / "launch" / "convert.py")]
    command += [f"--source={source}", f"--target={target}"]
    done = subprocess.run(
        ["/usr/bin/time", "-v", *command],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    found = re.search(r"Maximum resident set size \(kbytes\): (\d+)", done.stderr)
    assert found is not None, done.stderr
    return int(found[1]) * 1024


def _leaves(tree: dict) -> list:
    return [x for v in tree.values() for x in (_leaves(v) if isinstance(v, dict) else [v])]


if __name__ == "__main__":
    app.run(main)
