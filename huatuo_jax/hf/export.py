"""Writes a backbone as a Hugging Face model folder that transformers and vLLM load."""

import functools
import operator
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from huatuo_jax.backbone.config import BackboneConfig
from huatuo_jax.backbone.transformer import Head
from huatuo_jax.core.files import staged_folder
from huatuo_jax.core.folders import writing_directory
from huatuo_jax.hf import tokenizer as tokenizers
from huatuo_jax.hf.config import exported_layout, read_json, to_hugging_face, write_json
from huatuo_jax.hf.generation_config import (
    CONFIG_FILE,
    GENERATION_CONFIG_FILE,
    ids_in,
    token_fields_of,
)
from huatuo_jax.hf.safetensors_files import (
    TensorToWrite,
    common_dtype,
    parse_size,
    write_safetensors,
)
from huatuo_jax.hf.tensor_table import TensorRule, tensor_rules
from huatuo_jax.hf.tokenizer import SIDE_FILES, copy_files, drop_fields

# Tensors that share a layer of one of our parameters (query, key, value) are mostly written one
# after another, so the layer is fetched from its devices once for all of them.
_KEPT_LAYERS = 4


def export_model(
    params: Mapping[str, Any],
    cfg: BackboneConfig,
    target: pathlib.Path,
    *,
    head: Head,
    source_folder: pathlib.Path | None = None,
    ignored_fields: tuple[str, ...] = (),
    dtype: DTypeLike | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    describe: Callable[[pathlib.Path], None] | None = None,
) -> None:
    """Writes weights, config.json, tokenizer and generation config.

    The folder is complete or absent. One layer of one parameter is on the host at a time.

    Args:
        params: nested dict, as `transformer.init_params` makes it; every shard on this host.
        cfg: the backbone.
        target: the folder to make.
        head: `lm`, or `score` for a sequence classifier with one label.
        source_folder: the folder the model came from, whose config, generation config, tokenizer
            and chat template are copied; None for a model without them.
        ignored_fields: fields of its config to leave out.
        dtype: of the weights; None keeps that of the parameters.
        max_shard_size: of a weights file, in bytes or as "5GB".
        overwrite: replace a target that is not empty.
        describe: adds to the files beside the weights, whose folder it is given.

    Raises:
        ValueError: the family cannot be exported so (see `to_hugging_face`), or no id is free for
            padding a reward model's input.
        FileExistsError: the target is not empty and `overwrite` is not set.
        OSError: it cannot be written.
    """
    shard_size = parse_size(max_shard_size)
    dtypes = {np.dtype(leaf.dtype) for leaf in jax.tree.leaves(params)}
    source = _source_config(source_folder, ignored_fields)
    tokenizer = _tokenizer_source(source_folder)
    pad_token_id = None
    if head == "score":
        if tokenizer is None:
            raise ValueError(
                "a reward model is exported with its tokenizer, which gives the pad id; "
                "source_folder has none"
            )
        pad_token_id = tokenizers.spare_token_id(
            tokenizers.load_tokenizer(tokenizer),
            cfg.vocab_size,
            used_ids=ids_in(tokenizer / GENERATION_CONFIG_FILE),
        )
    config = to_hugging_face(
        cfg,
        head=head,
        dtype=np.dtype(dtype if dtype is not None else common_dtype(dtypes)),
        source=source,
        tokens=token_fields_of(source_folder),
        pad_token_id=pad_token_id,
    )
    layout = exported_layout(cfg)
    tensors = _tensors(params, tensor_rules(cfg, layout, head), cfg, dtype)
    with writing_directory(target, overwrite=overwrite) as folder:
        with staged_folder(folder) as beside:
            if source_folder is not None:
                _copy_side_files(source_folder, beside, layout)
                drop_fields(beside / CONFIG_FILE, ignored_fields)
            if config != source:
                write_json(beside / CONFIG_FILE, config)
            if tokenizer is not None:
                wanted = tokenizers.load_tokenizer(tokenizer)
                tokenizers.check_loads_as(wanted, beside, name=str(tokenizer))
            if pad_token_id is not None:
                tokenizers.set_pad_token(beside, pad_token_id)
            if describe is not None:
                describe(beside)
        write_safetensors(folder, tensors, max_shard_size=shard_size)


def _tensors(
    params: Mapping[str, Any],
    rules: tuple[TensorRule, ...],
    cfg: BackboneConfig,
    dtype: DTypeLike | None,
) -> list[TensorToWrite]:
    """Returns every tensor of the export, in the checkpoint's usual order: layer by layer."""

    @functools.lru_cache(maxsize=_KEPT_LAYERS)
    def parts(rule: TensorRule, layer: int) -> tuple[np.ndarray, ...]:
        leaf = _leaf(params, rule.path)
        return tuple(rule.split(np.asarray(leaf[layer] if rule.stacked else leaf)))

    def producer(rule: TensorRule, layer: int, part: int, to: np.dtype) -> Callable[[], np.ndarray]:
        return lambda: np.ascontiguousarray(parts(rule, layer)[part].astype(to, copy=False))

    tensors = []
    for layer in range(cfg.num_layers):
        for rule in rules:
            if layer and not rule.stacked:
                continue
            to = np.dtype(_leaf(params, rule.path).dtype if dtype is None else dtype)
            for part, (name, shape) in enumerate(zip(rule.names, rule.shapes, strict=True)):
                name = name.replace("{layer}", str(layer))
                tensors.append(TensorToWrite(name, shape, to, producer(rule, layer, part, to)))
    return tensors


def _leaf(params: Mapping[str, Any], path: str) -> Any:
    return functools.reduce(operator.getitem, path.split("/"), params)


def _source_config(
    source_folder: pathlib.Path | None, ignored_fields: tuple[str, ...]
) -> dict[str, Any] | None:
    if source_folder is None or not (source_folder / CONFIG_FILE).is_file():
        return None
    config = read_json(source_folder / CONFIG_FILE)
    return {name: value for name, value in config.items() if name not in ignored_fields}


def _tokenizer_source(source_folder: pathlib.Path | None) -> pathlib.Path | None:
    if source_folder is None or not tokenizers.holds_tokenizer(source_folder):
        return None
    return source_folder


def _copy_side_files(source_folder: pathlib.Path, folder: pathlib.Path, layout: str) -> None:
    """Copies the files beside the weights, byte for byte.

    A Baichuan that becomes a LLaMA loses its code: its tokenizer is written in the form that
    transformers loads without it.
    """
    if layout != "baichuan" and tokenizers.holds_tokenizer(source_folder):
        tokenizers.save_tokenizer(source_folder, folder)
        copy_files(source_folder, folder, (CONFIG_FILE, GENERATION_CONFIG_FILE))
    else:
        copy_files(source_folder, folder, SIDE_FILES)
