"""A model on its own in a folder: its config and its parameters, without a training run."""

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from huatuo_jax import atomic
from huatuo_jax.checkpoint import orbax_files
from huatuo_jax.checkpoint.differences import as_json

CONFIG_FILE = "backbone.json"
PARAMS_FOLDER = "params"


def save_model(
    directory: str | os.PathLike[str],
    params: Any,
    *,
    config: Mapping[str, Any],
    extra_files: Mapping[str, str | os.PathLike[str]] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a model folder: `backbone.json`, `params/` (Orbax), and files copied beside them.

    It is written beside its place and renamed when complete. With several processes all of them
    must call this, on a folder that all of them see.

    Args:
        directory: a local folder, new or empty.
        params: the tree of parameters.
        config: the backbone's config, JSON values.
        extra_files: files to copy into the folder by their name there, such as the tokenizer's.
        overwrite: replace a folder that is not empty; removed only after the new one is complete.

    Raises:
        FileExistsError: the folder is not empty and `overwrite` is not set.
        ValueError: the config has no JSON form, a file's name is taken or leaves the folder, or the
            parameters cannot be saved.
        OSError: it cannot be written.
    """
    files = dict(extra_files or {})
    for name in files:
        parts = pathlib.PurePosixPath(name).parts
        if not parts or ".." in parts or name[0] == "/" or parts[0] in (CONFIG_FILE, PARAMS_FOLDER):
            raise ValueError(f"extra_files: {name!r} is no free name inside the folder")
    config_text = json.dumps(as_json(config, name="config"), ensure_ascii=False, indent=2)
    target = pathlib.Path(os.path.abspath(directory))
    nonce = _agreed_nonce()
    writing: contextlib.AbstractContextManager[pathlib.Path] = (
        atomic.writing_directory(target, overwrite=overwrite, nonce=nonce)
        if jax.process_index() == 0
        else contextlib.nullcontext(atomic.temporary_name(target, nonce))
    )
    with writing as folder:
        multihost_utils.sync_global_devices(f"begin {folder}")
        orbax_files.write_arrays(folder / PARAMS_FOLDER, params)
        if jax.process_index() == 0:
            (folder / CONFIG_FILE).write_text(config_text + "\n", encoding="utf-8")
            for name, source in files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, folder / name)
    multihost_utils.sync_global_devices(f"done {folder}")


def is_model_directory(path: str | os.PathLike[str]) -> bool:
    """Tells whether a folder is a whole model as `save_model` writes it."""
    path = pathlib.Path(path)
    return (
        not atomic.is_unfinished(path)
        and (path / CONFIG_FILE).is_file()
        and (path / PARAMS_FOLDER).is_dir()
    )


def load_model_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the config of a model folder.

    Raises:
        FileNotFoundError: it is no model folder, or one that was never finished.
        OSError: the config cannot be read.
    """
    path = _checked(directory) / CONFIG_FILE
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise orbax_files.as_os_error(error, f"{path} cannot be read") from error


def load_model_params(directory: str | os.PathLike[str], abstract_params: Any) -> Any:
    """Reads the parameters of a model folder straight onto the devices, each its own shards.

    Args:
        directory: a folder written by `save_model`.
        abstract_params: the tree, a `jax.ShapeDtypeStruct` with a sharding for each array; without
            one it lands on the first device.

    Raises:
        FileNotFoundError: it is no model folder, or one that was never finished.
        ValueError: the saved parameters have other paths, shapes or dtypes; each one is named.
        OSError: the files cannot be read.
    """
    path = _checked(directory) / PARAMS_FOLDER
    return orbax_files.read_arrays(path, abstract_params, partial=False)


def _checked(directory: str | os.PathLike[str]) -> pathlib.Path:
    path = pathlib.Path(os.path.abspath(directory))
    if atomic.is_unfinished(path):
        raise FileNotFoundError(f"{path} is the leftover of an interrupted write, it is not whole")
    if not is_model_directory(path):
        raise FileNotFoundError(f"{path} is no model folder: it needs {CONFIG_FILE} and params/")
    return path


def _agreed_nonce() -> str:
    """Returns process 0's random name, so that all processes write into one folder."""
    nonce = np.uint32(int(atomic.new_nonce(), 16))
    return f"{int(multihost_utils.broadcast_one_to_all(nonce)):08x}"
