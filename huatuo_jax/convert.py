"""The command that converts a model between Hugging Face and Orbax format."""

import dataclasses
from typing import Literal

import jax

from huatuo_jax.checkpoint.convert import convert
from huatuo_jax.core import progress
from huatuo_jax.core.files import as_path
from huatuo_jax.reward.export import carry_normalization


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """Convert a model: Hugging Face to Orbax or back, decided by the source.

    Attributes:
        source: model folder of either form, or a Hub id.
        target: folder to make.
        dtype: dtype of the weights; None keeps the stored one.
        delta_base: base of a source that holds delta weights (HuatuoGPT-13B).
        ignore_config_fields: fields of config.json that are unknown here and do not matter.
        max_shard_size: size of a weights file.
        overwrite: replace a target that is not empty.
        verify: compare logits with transformers on a sample text.
    """

    source: str
    target: str
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    delta_base: str | None = None
    ignore_config_fields: tuple[str, ...] = ()
    max_shard_size: str = "5GB"
    overwrite: bool = False
    verify: bool = False


def main(flags: Flags) -> None:
    """Converts a model and prints its folder."""
    # Conversion needs the host's memory, not an accelerator's.
    jax.config.update("jax_platforms", "cpu")
    target = as_path(flags.target)
    with progress.progress_bar("reading", "tensors") as on_progress:
        agreement = convert(
            flags.source,
            target,
            dtype=flags.dtype,
            delta_base=flags.delta_base,
            ignore_config_fields=flags.ignore_config_fields,
            max_shard_size=flags.max_shard_size,
            overwrite=flags.overwrite,
            verify=flags.verify,
            on_progress=on_progress,
        )
    carry_normalization(flags.source, target, ignore_config_fields=flags.ignore_config_fields)
    if agreement is not None:
        print(f"verified: {agreement}")
    print(f"written: {target}")
