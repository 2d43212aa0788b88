"""Converting a model between Hugging Face's form and ours, whichever way its source calls for."""

import pathlib
import tempfile
from collections.abc import Collection
from typing import Any

from jax.typing import DTypeLike

from huatuo_jax import sharding
from huatuo_jax.checkpoint import verify as verification
from huatuo_jax.checkpoint.hf_export import export_model
from huatuo_jax.checkpoint.hf_load import Progress
from huatuo_jax.checkpoint.models import (
    Form,
    ModelInfo,
    find_folder,
    find_model,
    load_params,
    save_orbax,
)
from huatuo_jax.checkpoint.side_files import SideFiles
from huatuo_jax.checkpoint.tokenizer import holds_tokenizer


def convert(
    source: str,
    target: pathlib.Path,
    *,
    dtype: DTypeLike | None = None,
    delta_base: str | None = None,
    ignore_config_fields: Collection[str] = (),
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    verify: bool = False,
    on_progress: Progress | None = None,
) -> verification.Agreement | None:
    """Write a Hugging Face model as an Orbax directory of ours, or the other way round.

    All of it is done in the host's memory, whatever accelerators there are.

    Args:
        source: a folder of either form, or a hub id.
        target: the folder to make.
        dtype: of the weights; None keeps the stored one.
        delta_base: the base, where the source holds delta weights; its tokenizer is taken where the
            delta has none.
        ignore_config_fields: see `find_model`; they are left out of what is written.
        max_shard_size: of a weights file, where Hugging Face's form is written.
        overwrite: replace a target that is not empty.
        verify: compare the logits of both sides on a sample text.
        on_progress: called with tensors done and tensors in all, while a checkpoint is read.

    Returns:
        How well the sides agree, if `verify` was asked for.

    Raises:
        ValueError: the source cannot be converted so, or the sides do not agree.
        OSError: the source cannot be read or the target not be written.
    """
    model = find_model(source, ignore_config_fields=ignore_config_fields)
    to_orbax = model.form == "hugging_face"
    if verify and delta_base is not None:
        raise ValueError("--verify: delta weights have no counterpart in transformers to compare")
    if verify:
        verification.check_can_verify(model)
    params = load_params(
        model,
        mesh=sharding.host_mesh(),
        dtype=dtype,
        delta_base=delta_base,
        on_progress=on_progress,
    )
    write_model(
        params,
        model,
        target,
        form="orbax" if to_orbax else "hugging_face",
        side_files=_side_files(model, delta_base),
        max_shard_size=max_shard_size,
        overwrite=overwrite,
    )
    del params  # Two models in memory is what the comparison needs already.
    if not verify:
        return None
    ours, theirs = (target, model.folder) if to_orbax else (model.folder, target)
    agreement = verification.compare_with_transformers(find_model(ours), theirs)
    if not agreement.holds:
        raise ValueError(f"{target}: written, but the logits do not agree: {agreement}")
    return agreement


def write_model(
    params: dict[str, Any],
    model: ModelInfo,
    target: pathlib.Path,
    *,
    form: Form,
    side_files: SideFiles,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> None:
    """Writes a model that was loaded, in either form.

    Args:
        params: its parameters, every shard on this host.
        model: where they came from.
        target: the folder to make.
        form: of the target.
        side_files: what goes beside the weights.
        max_shard_size: of a weights file, where Hugging Face's form is written.
        overwrite: replace a target that is not empty.

    Raises:
        ValueError: it cannot be written so.
        OSError: the target cannot be written.
    """
    if form == "orbax":
        save_orbax(
            params,
            model.cfg,
            target,
            head=model.head,
            side_files=side_files,
            overwrite=overwrite,
        )
        return
    with tempfile.TemporaryDirectory() as name:
        source_folder = pathlib.Path(name)
        side_files.write(source_folder)
        export_model(
            params,
            model.cfg,
            target,
            head=model.head,
            source_folder=source_folder,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
        )


def _side_files(model: ModelInfo, delta_base: str | None) -> SideFiles:
    """Those of the source; the vocabulary of a delta is its own, and so is its config."""
    tokenizer_folder = None
    if delta_base is not None and not holds_tokenizer(model.folder):
        base = find_folder(delta_base)
        tokenizer_folder = base if holds_tokenizer(base) else None
    return SideFiles(
        model_folder=model.folder,
        tokenizer_folder=tokenizer_folder,
        ignored_fields=model.ignored_fields,
    )
