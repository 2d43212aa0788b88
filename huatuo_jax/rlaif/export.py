"""The release of a run: policy and reward model in Hugging Face format, read back and compared."""

import importlib.util
import pathlib
from typing import Any

import jax
import numpy as np

from huatuo_jax import sharding
from huatuo_jax.checkpoint import models
from huatuo_jax.checkpoint.convert import convert
from huatuo_jax.checkpoint.hf_export_config import exported_layout
from huatuo_jax.checkpoint.models import ModelInfo
from huatuo_jax.checkpoint.verify import Agreement, compare_with_transformers
from huatuo_jax.reward.export import export_reward_model
from huatuo_jax.rlaif.config import ExportConfig


def run_export(cfg: ExportConfig, folder: pathlib.Path) -> dict[str, Any]:
    """Writes `policy/` and `reward/`, and checks them.

    This needs the memory of the host, twice the larger of the two, and of no accelerator. Both are
    read back and must be the weights they came from, bit for bit; where PyTorch is installed,
    transformers must give the same logits and scores up to rounding.

    Returns:
        For each the number of weights, and what transformers said.

    Raises:
        ValueError: a model that cannot be exported so, or an export that differs.
        OSError: something cannot be read or written.
    """
    policy, reward = folder / "policy", folder / "reward"
    convert(cfg.policy, policy, dtype=cfg.dtype, overwrite=True)
    export_reward_model(cfg.reward, reward, dtype=cfg.dtype, overwrite=True)
    return {
        "policy": _checked(cfg.policy, policy, cfg.dtype),
        "reward": _checked(cfg.reward, reward, cfg.dtype),
    }


def _checked(source: str, target: pathlib.Path, dtype: str | None) -> dict[str, Any]:
    ours, theirs = models.find_model(source), models.find_model(target)
    found: dict[str, Any] = {
        "weights": _count_equal_weights(ours, theirs, dtype),
        "read_back": "equal bit for bit",
    }
    if importlib.util.find_spec("torch") is None or exported_layout(ours.cfg) == "baichuan":
        return found | {"transformers": None}
    agreement: Agreement = compare_with_transformers(theirs, target)
    if not agreement.holds:
        raise ValueError(f"{target}: written, but transformers computes otherwise: {agreement}")
    return found | {
        "transformers": {
            "max_difference": agreement.max_difference,
            "output_range": agreement.output_range,
            "num_tokens": agreement.num_tokens,
        }
    }


def _count_equal_weights(ours: ModelInfo, theirs: ModelInfo, dtype: str | None) -> int:
    """How many weights the two have, which must be the same bit for bit."""
    mesh = sharding.host_mesh()
    saved = models.load_params(ours, mesh=mesh, dtype=dtype)
    read = models.load_params(theirs, mesh=mesh)
    same = jax.tree.map(lambda one, other: bool(np.array_equal(one, other)), saved, read)
    if not all(jax.tree.leaves(same)):
        raise ValueError(
            f"{theirs.folder}: written, but its weights are not those of {ours.folder}"
        )
    return sum(leaf.size for leaf in jax.tree.leaves(read))
