"""Models on disk, found, loaded and saved: an Orbax model directory or a Hugging Face folder.

An Orbax model directory holds one model without a training run: `backbone.json`, `params/` and the
side files that an export needs.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Collection, Mapping
from typing import Any, Literal

import huggingface_hub
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jax.typing import DTypeLike

from huatuo_jax.backbone.config import BackboneConfig, ComputeConfig, preset
from huatuo_jax.backbone.transformer import Head, abstract_params
from huatuo_jax.checkpoint import orbax_files
from huatuo_jax.core import folders, sharding
from huatuo_jax.core.config import as_json
from huatuo_jax.core.files import (
    absolute,
    as_path,
    copy_file,
    files_below,
    make_folder,
    open_binary,
)
from huatuo_jax.hf import load, weight_files
from huatuo_jax.hf.config import from_hugging_face, is_score_model, read_json
from huatuo_jax.hf.generation_config import CONFIG_FILE
from huatuo_jax.hf.tokenizer import SIDE_FILES, SideFiles

BACKBONE_FILE = "backbone.json"
PARAMS_FOLDER = "params"
CARD_FILE = "README.md"
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_HASHED_BYTES = 1 << 16
_TORCH_WEIGHTS = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
# Models on the Hub that a preset describes; they need no network.
_PUBLISHED = {
    "baichuan-inc/Baichuan-7B": "baichuan_7b",
    "baichuan-inc/Baichuan-13B-Base": "baichuan_13b",
    "baichuan-inc/Baichuan2-7B-Base": "baichuan2_7b",
    "baichuan-inc/Baichuan2-13B-Base": "baichuan2_13b",
    "IDEA-CCNL/Ziya-LLaMA-13B-Pretrain-v1": "ziya_llama_13b",
    "IDEA-CCNL/Ziya-LLaMA-13B-v1": "ziya_llama_13b",
    "FreedomIntelligence/HuatuoGPT-7B": "huatuogpt_7b",
    "FreedomIntelligence/HuatuoGPT-13b-delta": "huatuogpt_13b",
    "meta-llama/Llama-3.1-8B": "llama3.1_8b",
    "meta-llama/Llama-3.1-8B-Instruct": "llama3.1_8b",
    "Qwen/Qwen2.5-0.5B": "qwen2.5_0.5b",
    "Qwen/Qwen2.5-1.5B": "qwen2.5_1.5b",
    "Qwen/Qwen2.5-7B": "qwen2.5_7b",
    "Qwen/Qwen2.5-14B": "qwen2.5_14b",
    "Qwen/Qwen3-0.6B": "qwen3_0.6b",
    "Qwen/Qwen3-1.7B": "qwen3_1.7b",
    "Qwen/Qwen3-4B": "qwen3_4b",
    "Qwen/Qwen3-8B": "qwen3_8b",
    "Qwen/Qwen3-14B": "qwen3_14b",
    "Qwen/Qwen3-32B": "qwen3_32b",
}

Form = Literal["orbax", "hugging_face"]


def save_model(
    directory: str | os.PathLike[str],
    params: Any,
    *,
    config: Mapping[str, Any],
    extra_files: Mapping[str, str | os.PathLike[str]] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a model folder: `backbone.json`, `params/` (Orbax), and files copied beside them.

    It is complete or absent (see `folders.writing_directory`). With several processes all of them
    must call this, on a folder that all of them see.

    Args:
        directory: the folder, new or empty.
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
        if (
            not parts
            or ".." in parts
            or name[0] == "/"
            or parts[0] in (BACKBONE_FILE, PARAMS_FOLDER)
        ):
            raise ValueError(f"extra_files: {name!r} must be a free name inside the folder")
    config_text = json.dumps(as_json(config, name="config"), ensure_ascii=False, indent=2)
    target = absolute(directory)
    orbax_files.check_place(target, name="directory")
    nonce = _agreed_nonce()
    writing: contextlib.AbstractContextManager[pathlib.Path] = (
        folders.writing_directory(target, overwrite=overwrite, nonce=nonce)
        if jax.process_index() == 0
        else contextlib.nullcontext(folders.temporary_name(target, nonce))
    )
    with writing as folder:
        multihost_utils.sync_global_devices(f"begin {folder}")
        orbax_files.write_arrays(folder / PARAMS_FOLDER, params)
        if jax.process_index() == 0:
            (folder / BACKBONE_FILE).write_text(config_text + "\n", encoding="utf-8")
            for name, source in files.items():
                make_folder((folder / name).parent)
                copy_file(source, folder / name)
    multihost_utils.sync_global_devices(f"done {folder}")


def is_model_directory(path: str | os.PathLike[str]) -> bool:
    """Returns whether a folder is a complete model as `save_model` writes it."""
    path = as_path(path)
    return (
        not folders.is_unfinished(path)
        and (path / BACKBONE_FILE).is_file()
        and (path / PARAMS_FOLDER).is_dir()
    )


def load_model_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the config of a model folder.

    Raises:
        FileNotFoundError: it is no model folder, or an incomplete one.
        OSError: the config cannot be read.
    """
    path = _checked(directory) / BACKBONE_FILE
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
        FileNotFoundError: it is no model folder, or an incomplete one.
        ValueError: the saved parameters have other paths, shapes or dtypes; each one is named.
        OSError: the files cannot be read.
    """
    path = _checked(directory) / PARAMS_FOLDER
    return orbax_files.read_arrays(path, abstract_params, partial=False)


def _checked(directory: str | os.PathLike[str]) -> pathlib.Path:
    path = absolute(directory)
    if folders.is_unfinished(path):
        raise FileNotFoundError(f"{path} is the leftover of an interrupted write and incomplete")
    if not is_model_directory(path):
        raise FileNotFoundError(f"{path} is no model folder: it needs {BACKBONE_FILE} and params/")
    return path


def _agreed_nonce() -> str:
    """Returns process 0's random name, so that all processes write into one folder."""
    nonce = np.uint32(int(folders.new_nonce(), 16))
    return f"{int(multihost_utils.broadcast_one_to_all(nonce)):08x}"


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """The content of a model directory, read from its config alone.

    Attributes:
        folder: on this machine.
        form: `orbax` or `hugging_face`.
        cfg: the backbone.
        head: `lm` or `score`.
        layout: of a Hugging Face folder: its `model_type`.
        ignored_fields: fields of its `config.json` that do not matter, by the user's word.
    """

    folder: pathlib.Path
    form: Form
    cfg: BackboneConfig
    head: Head
    layout: str | None
    ignored_fields: tuple[str, ...] = ()


def find_model(
    source: str | pathlib.Path, *, ignore_config_fields: Collection[str] = ()
) -> ModelInfo:
    """Finds a model in a local folder or on the Hub, and downloads it into the hub's cache.

    Args:
        source: folder or hub id.
        ignore_config_fields: unknown fields of a Hugging Face `config.json` that, by the caller's
            word, do not change what the model computes.

    Raises:
        FileNotFoundError: there is no such folder or hub model, or it holds no model.
        ValueError: its config is not supported; the message names the field.
    """
    folder = find_folder(source)
    if is_model_directory(folder):
        config = load_model_config(folder)
        cfg = BackboneConfig.from_dict(config["backbone"])
        return ModelInfo(folder, "orbax", cfg, config["head"], None)
    config = read_json(folder / CONFIG_FILE)
    head: Head = "score" if is_score_model(config) else "lm"
    cfg = from_hugging_face(config, ignored=ignore_config_fields)
    ignored = tuple(sorted(set(ignore_config_fields) & config.keys()))
    return ModelInfo(folder, "hugging_face", cfg, head, config["model_type"], ignored)


def architecture_of(source: str, *, ignored: Collection[str] = ()) -> BackboneConfig:
    """Returns the architecture of a local folder or Hub model, without its weights.

    Args:
        source: folder or Hub id.
        ignored: fields of its `config.json`, see `find_model`.

    Raises:
        OSError: there is no such folder or Hub model, or it holds no config.
        ValueError: its config is not supported; the message names the field.
    """
    if source in _PUBLISHED:
        return preset(_PUBLISHED[source])
    if as_path(source).is_dir():
        return find_model(source, ignore_config_fields=ignored).cfg
    path = huggingface_hub.hf_hub_download(source, CONFIG_FILE)
    return from_hugging_face(read_json(pathlib.Path(path)), ignored=ignored)


def find_folder(source: str | pathlib.Path) -> pathlib.Path:
    """Returns the local folder of a model: the given one, or a hub id's in the hub's cache.

    Raises:
        FileNotFoundError: there is no such folder or hub model, or it is incomplete.
    """
    folder = as_path(source)
    if not folder.is_dir():
        folder = _download(str(source))
    if folders.is_unfinished(folder):
        raise FileNotFoundError(f"{folder} is the leftover of an interrupted write and incomplete")
    return folder


def load_params(
    model: ModelInfo,
    *,
    mesh: Mesh | None = None,
    dtype: DTypeLike | None = None,
    delta_base: str | pathlib.Path | None = None,
    on_progress: load.Progress | None = None,
) -> dict[str, Any]:
    """Loads the model's parameters straight onto their devices.

    Args:
        model: from `find_model`.
        mesh: of the parameters; None for the first device alone.
        dtype: of the parameters; None keeps the stored one.
        delta_base: folder or hub id of the base, for a Hugging Face folder of delta weights.
        on_progress: called with tensors done and tensors in all (Hugging Face folders).

    Raises:
        ValueError: the weights do not fit the config; the message names the tensors.
        OSError: they cannot be read.
    """
    if model.form == "hugging_face":
        assert model.layout is not None
        source = weight_files.open_tensor_source(model.folder)
        if delta_base is not None:
            base = weight_files.open_tensor_source(find_folder(delta_base))
            source = load.add_delta(source, base)
        return load.load_params(
            source,
            model.cfg,
            layout=model.layout,
            head=model.head,
            mesh=mesh,
            dtype=dtype,
            on_progress=on_progress,
        )
    if delta_base is not None:
        raise ValueError(f"{model.folder}: delta weights are a Hugging Face folder, this is Orbax")
    return _load_orbax(model, mesh, dtype)


def save_orbax(
    params: Any,
    cfg: BackboneConfig,
    target: pathlib.Path,
    *,
    head: Head,
    source_folder: pathlib.Path | None = None,
    side_files: SideFiles | None = None,
    overwrite: bool = False,
) -> None:
    """Writes an Orbax model directory, with the side files that an export needs.

    Args:
        params: nested dict of parameters.
        cfg: the backbone.
        target: the folder to make.
        head: which head the parameters hold.
        source_folder: the source of config, generation config, tokenizer and template.
        side_files: in place of `source_folder`, if they have several sources or are changed.
        overwrite: replace a target that is not empty.

    Raises:
        FileExistsError: the target is not empty and `overwrite` is not set.
        OSError: it cannot be written.
    """
    dtypes = {
        sharding.path_name(path): str(leaf.dtype)
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    }
    with tempfile.TemporaryDirectory() as name:
        staged = pathlib.Path(name)
        if jax.process_index() == 0:
            (side_files or SideFiles(model_folder=source_folder)).write(staged)
        files = sorted(path for path in staged.rglob("*") if path.is_file())
        save_model(
            target,
            params,
            config={"backbone": cfg.to_dict(), "head": head, "dtypes": dtypes},
            extra_files={path.relative_to(staged).as_posix(): path for path in files},
            overwrite=overwrite,
        )


def _load_orbax(model: ModelInfo, mesh: Mesh | None, dtype: DTypeLike | None) -> dict[str, Any]:
    """Reads shards as they were saved, then casts them: Orbax would cast silently."""
    dtypes = load_model_config(model.folder)["dtypes"]
    shapes = abstract_params(model.cfg, ComputeConfig(), head=model.head)
    saved = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.ShapeDtypeStruct(
            leaf.shape, np.dtype(dtypes[sharding.path_name(path)])
        ),
        shapes,
    )
    if mesh is not None:
        saved = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            saved,
            sharding.parameter_shardings(saved, mesh),
        )
    params = load_model_params(model.folder, saved)
    if dtype is None:
        return params
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def _download(hub_id: str) -> pathlib.Path:
    """Downloads a hub model into the local cache: safetensors if it has them."""
    patterns = [*SIDE_FILES, CARD_FILE]
    try:
        folder = huggingface_hub.snapshot_download(hub_id, allow_patterns=[*patterns, *_WEIGHTS])
        if not any(pathlib.Path(folder).glob("*.safetensors")):
            patterns += _TORCH_WEIGHTS
            folder = huggingface_hub.snapshot_download(hub_id, allow_patterns=patterns)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"{hub_id}: no such folder, and not available from the Hugging Face Hub ({reason})"
        ) from error
    return pathlib.Path(folder)


def fingerprint(folder: pathlib.Path) -> str:
    """Returns a hash of a model's files, the same wherever they lie.

    It covers names, sizes, and the first and last 64 KiB of each file: fine-tuned models of one
    architecture differ there, and a large model is not read twice. Cards are left out.
    """
    whole = hashlib.sha256()
    for name, size in files_below(folder).items():
        if name.name == CARD_FILE:
            continue
        whole.update(f"{name}\0{size}\0".encode())
        with open_binary(folder / str(name)) as file:
            whole.update(file.read(_HASHED_BYTES))
            file.seek(max(size - _HASHED_BYTES, 0))
            whole.update(file.read(_HASHED_BYTES))
    return whole.hexdigest()[:32]
