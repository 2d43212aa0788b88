"""Peak host memory of converting a checkpoint, against its bound; in a bucket, local disk too.

A synthetic LLaMA of about 1.5 GB in four shards is converted to Orbax and back, each in a process
of its own under `/usr/bin/time -v`. The bound: the destination's arrays, one stacked tensor, and
1 GiB for everything else (Python and jax among it). Between folders of a bucket it writes no more
than 100 MB to local disks.

    python benchmarks/convert_memory.py [--workdir=DIR]
    python -m tests.bucket_server python benchmarks/convert_memory.py --workdir=gs://bucket
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
from huatuo_jax.core.files import as_path, is_address, make_folder, remove_folder
from huatuo_jax.hf.config import to_hugging_face
from huatuo_jax.hf.safetensors_files import TensorToWrite, write_safetensors
from huatuo_jax.hf.tensor_table import tensor_rules

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder or address to work in; default: the system's for temporary files."
)

ROOT = pathlib.Path(__file__).resolve().parents[1]
GIB = 2**30
MOST_LOCAL_BYTES = 100 * 10**6
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
    folder = as_path(_WORKDIR.value or tempfile.gettempdir()) / f"convert_memory_{os.getpid()}"
    try:
        holds = compare_with_bound(folder)
    finally:
        remove_folder(folder)
    sys.exit(0 if holds else 1)


def compare_with_bound(folder: pathlib.Path) -> bool:
    """Print a line for each direction; whether both hold."""
    size = make_checkpoint(folder / "hf")
    leaves = abstract_params(CFG, ComputeConfig())
    largest = max(math.prod(leaf.shape) * 4 for leaf in _leaves(leaves))
    bound = size + largest + GIB
    print(f"checkpoint {size / GIB:.2f} GiB, largest stacked tensor {largest / GIB:.2f} GiB")
    holds = True
    for source, target in (("hf", "orbax"), ("orbax", "back")):
        peak, written = converted(folder / source, folder / target)
        verdict = "within" if peak <= bound else "OVER"
        line = (
            f"{source} to {target}: peak {peak / GIB:.2f} GiB, {verdict} the bound of "
            f"{bound / GIB:.2f} GiB"
        )
        holds &= peak <= bound
        if is_address(folder):
            holds &= written <= MOST_LOCAL_BYTES
            line += f"; {written / 1e6:.1f} MB written to local disks"
        print(line, flush=True)
    return holds


def make_checkpoint(folder: pathlib.Path) -> int:
    """Write random weights tensor by tensor in four shards; their size in bytes."""
    make_folder(folder)
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


def converted(source: pathlib.Path, target: pathlib.Path) -> tuple[int, int]:
    """Convert in a process of its own; its maximum resident set and what it wrote, in bytes."""
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
    names = r"Maximum resident set size \(kbytes\)", "File system outputs"
    peak, blocks = (re.search(rf"{name}: (\d+)", done.stderr) for name in names)
    assert peak is not None and blocks is not None, done.stderr
    return int(peak[1]) * 1024, int(blocks[1]) * 512


def _leaves(tree: dict) -> list:
    return [x for v in tree.values() for x in (_leaves(v) if isinstance(v, dict) else [v])]


if __name__ == "__main__":
    app.run(main)
