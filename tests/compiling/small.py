"""A model that is compiled in a minute: what tests of compiling share."""

import json
import os
import pathlib
import subprocess
import sys

from huatuo_jax.core.config import replaced
from huatuo_jax.recipe.config import StagesConfig
from huatuo_jax.sft import SftConfig
from huatuo_jax.training.dialogue_data import DataConfig, SourceConfig
from huatuo_jax.training.initial_model import ComputeSection, ModelConfig
from huatuo_jax.training.optimizer import OptimizerConfig
from tests.tiny import backbone

ROOT = pathlib.Path(__file__).resolve().parents[2]

BACKBONE = backbone(
    hidden_size=512,
    intermediate_size=1408,
    num_heads=4,
    head_dim=128,
    max_positions=512,
)


def small_sft(**changed):
    """A config as `launch/compile.py` takes it; fields are changed by their path."""
    sft = SftConfig(
        model=ModelConfig(backbone=BACKBONE, tokenizer="none"),
        data=DataConfig(sources=(SourceConfig(name="none", paths=("none",)),), row_length=512),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        batch_size=32,
        micro_batch_size=16,
        compute=ComputeSection(compute_dtype="bfloat16", remat="full"),
    )
    return replaced(StagesConfig(sft=sft), changed)


def get_config():
    """As a config file has it."""
    return small_sft()


def environment():
    """With none of the tests' settings of jax and XLA."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    kept.pop("XLA_FLAGS", None)
    return kept | {"PYTHONPATH": str(ROOT)}


def compile_small(*arguments):
    """The command on this config, in a process of its own: a compiler is loaded once in each."""
    return subprocess.run(
        [sys.executable, "launch/compile.py", "--config=tests/compiling/small.py", *arguments],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )


def figures_of(topology, path):
    """What the command writes of this config, which fits."""
    found = compile_small(f"--topology={topology}", f"--output={path}")
    assert found.returncode == 0, found.stderr
    assert "fits" in found.stdout and "roofline" in found.stdout
    return json.loads(path.read_text())


def matmul_flops_per_token():
    """Of a step that recomputes its layers: forward 2, backward 4, recomputed 2 a parameter.

    But for the last product of a layer, whose result the backward pass has no use for; the head is
    recomputed too.
    """
    cfg = BACKBONE
    heads = cfg.num_heads + 2 * cfg.num_kv_heads
    qkv = cfg.hidden_size * heads * cfg.head_dim
    output = cfg.num_heads * cfg.head_dim * cfg.hidden_size
    gate_up, down = (n * cfg.hidden_size * cfg.intermediate_size for n in (2, 1))
    layer = 8 * (qkv + output + gate_up) + 6 * down
    return cfg.num_layers * layer + 8 * cfg.hidden_size * cfg.vocab_size
