"""Which architecture each stage of a config has, without reading a weight."""

import dataclasses
import pathlib

import huggingface_hub

from huatuo_jax.backbone.config import BackboneConfig
from huatuo_jax.backbone.presets import PRESETS, preset
from huatuo_jax.checkpoint import models
from huatuo_jax.checkpoint.generation_config import CONFIG_FILE
from huatuo_jax.checkpoint.hf_config import from_hugging_face, read_json
from huatuo_jax.config import WORKDIR_MARK
from huatuo_jax.training.initial_model import ModelConfig

# Models on the hub that a preset describes, so that no network is needed for them.
_PUBLISHED = {
    "baichuan-inc/Baichuan-7B": "baichuan_7b",
    "baichuan-inc/Baichuan-13B-Base": "baichuan_13b",
    "baichuan-inc/Baichuan2-7B-Base": "baichuan2_7b",
    "baichuan-inc/Baichuan2-13B-Base": "baichuan2_13b",
    "IDEA-CCNL/Ziya-LLaMA-13B-Pretrain-v1": "ziya_llama_13b",
    "IDEA-CCNL/Ziya-LLaMA-13B-v1": "ziya_llama_13b",
    "FreedomIntelligence/HuatuoGPT-7B": "huatuogpt_7b",
    "FreedomIntelligence/HuatuoGPT-13b-delta": "huatuogpt_13b",
    "Qwen/Qwen2.5-0.5B": "qwen2.5_0.5b",
    "Qwen/Qwen2.5-1.5B": "qwen2.5_1.5b",
    "Qwen/Qwen2.5-7B": "qwen2.5_7b",
    "Qwen/Qwen2.5-14B": "qwen2.5_14b",
}


class Architectures:
    """What models of a config are like, told from the config, this machine, or the hub's config."""

    def __init__(self, named: str | None) -> None:
        """Nothing is known yet.

        Args:
            named: the preset of every model that no stage of the config makes; None looks them up.

        Raises:
            ValueError: no preset is called so.
        """
        self._named = None if named is None else preset(named)
        self._made: dict[str, BackboneConfig] = {}

    def add(self, stage: str, cfg: BackboneConfig) -> None:
        """Note what the model is like that a stage leaves in its folder."""
        self._made[f"{WORKDIR_MARK}/{stage}/model"] = cfg

    def in_place(self, section: ModelConfig, *, path: str) -> ModelConfig:
        """The section with the architecture in place of its directory.

        Raises:
            ValueError: there is no such model; names the field.
        """
        if section.directory is None:
            return section
        return dataclasses.replace(
            section,
            directory=None,
            backbone=self.of(
                section.directory, path=f"{path}.directory", ignored=section.ignore_config_fields
            ),
            tokenizer=section.tokenizer_source,
        )

    def of(self, directory: str, *, path: str, ignored: tuple[str, ...] = ()) -> BackboneConfig:
        """The architecture of a model that an earlier stage makes, of a folder, or of a hub id.

        Args:
            directory: of the model.
            path: of the field, for messages.
            ignored: fields of its `config.json`, see `models.find_model`.

        Raises:
            ValueError: there is no such model; names the field.
        """
        if directory in self._made:
            return self._made[directory]
        if self._named is not None:
            return self._named
        if directory in _PUBLISHED:
            return preset(_PUBLISHED[directory])
        reason = "no stage of this config makes it"
        if WORKDIR_MARK not in directory:
            try:
                return _from_config(directory, ignored)
            except OSError as error:
                reason = f"its {CONFIG_FILE} cannot be read: {str(error).strip().splitlines()[0]}"
        raise ValueError(
            f"{path}={directory!r}: {reason}; --preset names an architecture in its place: "
            f"{', '.join(PRESETS)}"
        )


def _from_config(directory: str, ignored: tuple[str, ...]) -> BackboneConfig:
    """What the config of a folder or of a hub model says; no weight is downloaded."""
    if pathlib.Path(directory).is_dir():
        return models.find_model(directory, ignore_config_fields=ignored).cfg
    path = huggingface_hub.hf_hub_download(directory, CONFIG_FILE)
    return from_hugging_face(read_json(pathlib.Path(path)), ignored=ignored)
