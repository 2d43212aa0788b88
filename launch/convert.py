"""Convert a model: Hugging Face to Orbax or back, told from the source.

python launch/convert.py --source=DIR_OR_HUB_ID --target=DIR [--verify]
"""

import os
import pathlib

# Conversion needs host memory, not an accelerator's.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from absl import flags

from huatuo_jax import command_line, progress
from huatuo_jax.checkpoint.convert import convert
from huatuo_jax.reward.export import carry_normalization

_SOURCE = flags.DEFINE_string("source", None, "Model folder of either form, or a hub id.")
_TARGET = flags.DEFINE_string("target", None, "Folder to make.")
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16", "float16"], "Dtype of the weights; default: as stored."
)
_DELTA_BASE = flags.DEFINE_string(
    "delta_base", None, "Base of a source that holds delta weights (HuatuoGPT-13B)."
)
_IGNORE_CONFIG_FIELDS = flags.DEFINE_list(
    "ignore_config_fields",
    [],
    "Fields of config.json, separated by commas, that are unknown here and do not matter.",
)
_MAX_SHARD_SIZE = flags.DEFINE_string("max_shard_size", "5GB", "Size of a weights file.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace a target that is not empty.")
_VERIFY = flags.DEFINE_bool("verify", False, "Compare logits with transformers on a sample text.")
flags.mark_flags_as_required(["source", "target"])


def main() -> None:
    """Convert, and say what was written."""
    target = pathlib.Path(_TARGET.value)
    with progress.progress_bar("reading", "tensors") as on_progress:
        agreement = convert(
            _SOURCE.value,
            target,
            dtype=_DTYPE.value,
            delta_base=_DELTA_BASE.value,
            ignore_config_fields=_IGNORE_CONFIG_FIELDS.value,
            max_shard_size=_MAX_SHARD_SIZE.value,
            overwrite=_OVERWRITE.value,
            verify=_VERIFY.value,
            on_progress=on_progress,
        )
    carry_normalization(_SOURCE.value, target, ignore_config_fields=_IGNORE_CONFIG_FIELDS.value)
    if agreement is not None:
        print(f"verified: {agreement}")
    print(f"written: {target}")


if __name__ == "__main__":
    command_line.run(main)
