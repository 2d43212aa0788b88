"""A reward model that scores responses."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

from huatuo_jax.api.in_use import ModelInUse, SaveFormat, Settings, open_for_use
from huatuo_jax.api.responses import Response
from huatuo_jax.backbone.config import ComputeConfig
from huatuo_jax.data.python_data import DialogueLike
from huatuo_jax.generation.saved_model import SavedModel
from huatuo_jax.reward.export import carry_normalization
from huatuo_jax.scoring import Normalization, load_normalization
from huatuo_jax.sharding import MeshConfig


class RewardModel(ModelInUse):
    """A reward model with its tokenizer and chat template; see `load_reward_model`.

    Attributes:
        max_length: tokens of a dialogue and a response at most.
        normalization: mean and standard deviation that were stored with it; None where none were.
        result: what the stage reported that trained it; None for a model that was loaded.
    """

    def __init__(
        self,
        saved: SavedModel,
        compute: ComputeConfig,
        *,
        max_length: int,
        normalization: Normalization | None,
        result: dict[str, Any] | None = None,
    ) -> None:
        """Made by `load_reward_model` and by `train_reward_model`."""
        super().__init__(saved, compute, max_length=max_length, result=result)
        self.normalization = normalization

    def score(
        self,
        dialogue: DialogueLike,
        response: str | Response,
        *,
        raw: bool = False,
        drop_oldest_turns: bool = False,
    ) -> float:
        """How good a response is; only scores of responses to one dialogue compare.

        Args:
            dialogue: the user's words; or messages with role and content, the user's last.
            response: its text; or one that `Model.generate` gave.
            raw: as the model's head gives it; otherwise normalised, where a normalization is
                stored with the model.
            drop_oldest_turns: leave out the oldest turns of a dialogue that is too long.

        Raises:
            ValueError: the dialogue is empty, out of order or too long.
        """
        (found,) = self.score_batch(
            [dialogue], [response], raw=raw, drop_oldest_turns=drop_oldest_turns
        )
        return found

    def score_batch(
        self,
        dialogues: Sequence[DialogueLike],
        responses: Sequence[str | Response],
        *,
        raw: bool = False,
        drop_oldest_turns: bool = False,
    ) -> list[float]:
        """`score` of several responses, each to its own dialogue."""
        given = self._given(dialogues, responses, drop_oldest_turns)
        if not given:
            return []
        found: list[float] = self._scorer(len(given)).scores(given).tolist()
        if raw or self.normalization is None:
            return found
        normalized: list[float] = self.normalization.apply(found).tolist()
        return normalized

    def save(
        self,
        target: str | os.PathLike[str],
        *,
        format: SaveFormat = "hf",
        overwrite: bool = False,
    ) -> None:
        """Writes the model with its tokenizer and normalization.

        Args:
            target: the folder to make.
            format: `hf` for transformers' sequence classification, whose scores are raw; `orbax`
                for a folder of ours.
            overwrite: replace a folder that is not empty.

        Raises:
            ValueError: an unknown format, or a family that transformers has no classifier for.
            FileExistsError: the folder is not empty and `overwrite` is not set.
            OSError: it cannot be written.
        """
        self._write(target, format, overwrite)
        carry_normalization(
            self.folder,
            pathlib.Path(target),
            ignore_config_fields=self.ignored_config_fields,
        )


def load_reward_model(
    source: str | os.PathLike[str],
    *,
    template: str | None = None,
    default_system: str | None = None,
    template_date: str | None = None,
    mesh: MeshConfig | None = None,
    compute_dtype: str | None = None,
    max_length: int | None = None,
    ignore_config_fields: Sequence[str] = (),
) -> RewardModel:
    """A reward model from disk, ready to score; arguments as for `load_model`.

    Raises:
        ValueError: there is no such model, it has a token head, the template does not suit its
            tokenizer, or the mesh does not divide it.
        OSError: its weights cannot be read.
    """
    settings = Settings(
        template=template,
        default_system=default_system,
        template_date=template_date,
        mesh=mesh,
        compute_dtype=compute_dtype,
        max_length=max_length,
        ignore_config_fields=ignore_config_fields,
    )
    model = open_reward_model(source, settings)
    _ = model.params  # Now, so that what is wrong with the weights is said here.
    return model


def open_reward_model(
    source: str | os.PathLike[str], settings: Settings, *, result: dict[str, Any] | None = None
) -> RewardModel:
    """As `load_reward_model`, but the weights are read when they are first needed."""
    saved, compute, limit = open_for_use(source, "score", settings)
    return RewardModel(
        saved,
        compute,
        max_length=limit,
        normalization=load_normalization(saved.info.folder),
        result=result,
    )
