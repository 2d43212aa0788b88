"""Which architecture each stage of a config has, without reading a weight."""

import dataclasses

from huatuo_jax.backbone.config import BackboneConfig
from huatuo_jax.backbone.presets import PRESETS, preset
from huatuo_jax.checkpoint import models
from huatuo_jax.checkpoint.generation_config import CONFIG_FILE
from huatuo_jax.config import WORKDIR_MARK
from huatuo_jax.training.initial_model import ModelConfig


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
        reason = "no stage of this config makes it"
        if WORKDIR_MARK not in directory:
            try:
                return models.architecture_of(directory, ignored=ignored)
            except OSError as error:
                reason = f"its {CONFIG_FILE} cannot be read: {str(error).strip().splitlines()[0]}"
        raise ValueError(
            f"{path}={directory!r}: {reason}; --preset names an architecture in its place: "
            f"{', '.join(PRESETS)}"
        )
