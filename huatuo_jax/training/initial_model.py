"""The model that a run trains: its config, first state, tokenizer, and how it is saved.

A backbone comes from a preset, from its fields or from a model on disk. A saved model comes with
its tokenizer, chat template and stop tokens, so that others use it with the tokens of its training.
"""

import dataclasses
import functools
import math
import pathlib
import tempfile
from typing import TYPE_CHECKING, Any, Literal

import jax
from jax.sharding import Mesh

from huatuo_jax.backbone import lora
from huatuo_jax.backbone.config import BackboneConfig, ComputeConfig, Kernel, Remat, preset
from huatuo_jax.backbone.lora import LoraConfig, init_adapters
from huatuo_jax.backbone.matmul import store_as_computed
from huatuo_jax.backbone.transformer import Head, Transformer, init_params
from huatuo_jax.checkpoint import models
from huatuo_jax.core.config import operational
from huatuo_jax.data.chat.template import ChatTemplate
from huatuo_jax.data.chat.tokenizer_template import exported_source, gives_the_tokens, unread_tokens
from huatuo_jax.hf import generation_config
from huatuo_jax.hf import tokenizer as tokenizers
from huatuo_jax.hf.config import exported_layout
from huatuo_jax.hf.tokenizer import SideFiles, Talk
from huatuo_jax.training.metrics import ModelFlops
from huatuo_jax.training.optimizer import Optimizer
from huatuo_jax.training.update import (
    TrainState,
    Variables,
    abstract,
    join,
    make_sharded,
    new_state,
    split,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Folded into the run's key for the fresh values of adapters and of a score head.
_ADAPTERS_ROLE = 1

_SCORE_HEAD_ROLE = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A model to train, given in one of three ways, and which part of it is trained.

    Attributes:
        directory: a Hugging Face folder or hub id, or an Orbax directory of ours.
        preset: a published architecture with fresh weights.
        backbone: an architecture of its own with fresh weights.
        tokenizer: folder or hub id of the tokenizer, from which nothing else is taken; None for the
            model directory's own.
        ignore_config_fields: fields of the directory's `config.json` that are unknown here and
            change nothing of what the model computes; they are left out of what is written.
        lora: train these adapters beside frozen weights; None trains the weights.
        freeze_embeddings: leave the embedding table as it is (with a tied head, the head too).
        frozen_as_computed: hold what is frozen in the compute dtype; it is cast to it anyway.
    """

    directory: str | None = operational(None)
    preset: str | None = None
    backbone: BackboneConfig | None = None
    tokenizer: str | None = operational(None)
    ignore_config_fields: tuple[str, ...] = operational(())
    lora: LoraConfig | None = None
    freeze_embeddings: bool = False
    frozen_as_computed: bool = True

    def __post_init__(self) -> None:
        """Raises ValueError unless exactly one way to find the model is given."""
        ways = {name: getattr(self, name) for name in ("directory", "preset", "backbone")}
        given = [name for name, value in ways.items() if value is not None]
        if len(given) != 1:
            raise ValueError(
                f"the model is given by {' and '.join(given) or 'nothing'}; give exactly one of "
                f"{', '.join(ways)}"
            )
        if self.directory is None and self.tokenizer is None:
            raise ValueError("tokenizer=None needs a model directory to take it from")

    @property
    def tokenizer_source(self) -> str:
        """Folder or hub id of the tokenizer."""
        source = self.tokenizer or self.directory
        assert source is not None
        return source


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeSection:
    """The computation of a step: dtypes, rematerialisation, kernels, chunks.

    Attributes:
        compute_dtype: dtype of matrix products; weights and optimizer are float32.
        remat: see `ComputeConfig`.
        kernel: see `ComputeConfig`.
        query_chunk: see `ComputeConfig`.
        loss_chunk: positions of each row whose logits are held at once; fewer where a device has
            so many rows that it would hold those of more than 1,024 positions.
    """

    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = operational("none")
    kernel: Kernel = operational("auto")
    query_chunk: int = operational(64)
    loss_chunk: int = operational(128)

    def __post_init__(self) -> None:
        """Raises ValueError for a chunk below 1."""
        if self.loss_chunk < 1:
            raise ValueError(f"loss_chunk={self.loss_chunk!r} must be at least 1")
        self.compute_config()

    def compute_config(self) -> ComputeConfig:
        """Returns the backbone's part of it."""
        return ComputeConfig(
            compute_dtype=self.compute_dtype,
            remat=self.remat,
            kernel=self.kernel,
            query_chunk=self.query_chunk,
        )


@dataclasses.dataclass(frozen=True)
class InitialModel:
    """A model to start from; its weights are not read before `make_state`.

    Attributes:
        cfg: the backbone.
        section: where it comes from and what of it is trained.
        compute: how it is computed.
        info: the model on disk, None for fresh weights.
        head: `lm`, or `score`: then a token head is left out, and a score head on disk is kept.
        head_init: a fresh score head gives scores of about this standard deviation.
        head_only: train the score head and nothing else.
    """

    cfg: BackboneConfig
    section: ModelConfig
    compute: ComputeConfig
    info: models.ModelInfo | None
    head: Head = "lm"
    head_init: float = 0.01
    head_only: bool = False

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that the first weights depend on, beside the seed."""
        weights = None if self.info is None else models.fingerprint(self.info.folder)
        return {"backbone": self.cfg.to_dict(), "weights": weights}

    @property
    def transformer(self) -> Transformer:
        """The module its variables belong to."""
        return Transformer(self.cfg, self.compute, self.section.lora)

    @property
    def flops(self) -> ModelFlops:
        """The model's part of the count of a step's floating-point operations."""
        adapters_only = self.head_only or self.section.lora is not None
        return ModelFlops.of(self.cfg, adapters_only=adapters_only)

    def make_state(self, key: jax.Array, optimizer: Optimizer, mesh: Mesh) -> TrainState:
        """Returns the state before the first step, in its shards.

        Raises:
            ValueError: the weights on disk are not those of the config, or a dimension does not
                divide over the mesh.
            OSError: they cannot be read.
        """

        def build(key: jax.Array, params: Variables) -> TrainState:
            return self._state(key, params, optimizer)

        if self.info is None:
            return make_sharded(lambda key: build(key, self._fresh(key)), mesh, key)
        params = models.load_params(self.info, mesh=mesh, dtype=self.compute.param_dtype)
        if self.head == "score":
            params.pop("lm_head", None)
        return make_sharded(build, mesh, key, params, donated=(1,))

    def abstract_state(self, optimizer: Optimizer, mesh: Mesh) -> TrainState:
        """Returns that state's shapes and shardings."""
        return abstract(
            lambda key: self._state(key, self._fresh(key), optimizer), mesh, jax.random.key(0)
        )

    def is_trained(self, path: str) -> bool:
        """Tells whether the variable at a path such as `params/embedding/table` is trained."""
        if self.head == "score" and path.startswith("params/score_head/"):
            return True
        if self.head_only:
            return False
        if self.section.lora is not None:
            return path.startswith("lora/")
        return not (self.section.freeze_embeddings and path == "params/embedding/table")

    def load_tokenizer(self, stage: str, template: ChatTemplate) -> "PreTrainedTokenizerBase":
        """Loads the tokenizer of the model's section and checks that it suits model and template.

        All that `save` writes beside the weights is written once, elsewhere, so that nothing of it
        fails after training.

        Args:
            stage: that asks, for messages.
            template: of the dialogues.

        Raises:
            ValueError: there is none, the template or the model does not suit it, or a dialogue may
                hold a token that the model has no embedding for.
        """
        tokenizer = tokenizers.load_tokenizer(self.section.tokenizer_source)
        name, size = f"config.{stage}.model.tokenizer", self.cfg.vocab_size
        tokenizers.check_fits(tokenizer, size, name=name)
        template.check_fits(tokenizer, size, name=name)
        with tempfile.TemporaryDirectory() as folder:
            self._side_files(template, tokenizer).write(pathlib.Path(folder))
        return tokenizer

    def stop_token_ids(
        self, template: ChatTemplate, tokenizer: "PreTrainedTokenizerBase"
    ) -> tuple[int, ...]:
        """Returns the ids that end an answer; see `generation_config.stop_token_ids`.

        Raises:
            ValueError: an id that the model does not have.
        """
        return generation_config.stop_token_ids(
            None if self.info is None else self.info.folder,
            tokenizer,
            of_template=template.stop_token_ids(tokenizer),
            vocab_size=self.cfg.vocab_size,
        )

    def merged(self, variables: Variables) -> dict[str, Any]:
        """Returns the parameters with the adapters' updates added to them."""
        params: dict[str, Any] = variables["params"]
        if self.section.lora is None:
            return params
        merge = functools.partial(lora.merge, cfg=self.cfg, lora=self.section.lora)
        return jax.jit(merge)(params, variables["lora"])

    def save(
        self,
        variables: Variables,
        target: pathlib.Path,
        *,
        template: ChatTemplate,
        tokenizer: "PreTrainedTokenizerBase",
    ) -> None:
        """Writes the model as a directory of ours, adapters merged, with its side files.

        Weights keep the dtype they were trained in. Config and generation config are those of the
        weights' source, the tokenizer's files those of the section's tokenizer; its chat template
        and what ends an answer become those of training.

        Args:
            variables: the trained ones.
            target: the folder to make, or to replace.
            template: of the dialogues.
            tokenizer: from `load_tokenizer`.
        """
        models.save_orbax(
            self.merged(variables),
            self.cfg,
            target,
            head=self.head,
            side_files=self._side_files(template, tokenizer),
            overwrite=True,
        )

    def _side_files(
        self, template: ChatTemplate, tokenizer: "PreTrainedTokenizerBase"
    ) -> SideFiles:
        given = self.section.tokenizer
        return SideFiles(
            model_folder=None if self.info is None else self.info.folder,
            tokenizer_folder=None if given is None else tokenizers.local_folder(given),
            ignored_fields=() if self.info is None else self.info.ignored_fields,
            talk=talk_of(
                template,
                tokenizer,
                stop_token_ids=self.stop_token_ids(template, tokenizer),
                cfg=self.cfg,
            ),
        )

    def _fresh(self, key: jax.Array) -> Variables:
        params = init_params(key, self.cfg, self.compute, head=self.head)
        params.pop("score_head", None)  # `_state` makes it, as for a model from disk without one.
        return params

    def _score_head(self, key: jax.Array) -> Variables:
        """Makes a fresh head; trunk outputs have mean square 1, about, and `hidden_size` parts."""
        width = self.cfg.hidden_size
        scale = self.head_init / math.sqrt(width)
        role = jax.random.fold_in(key, _SCORE_HEAD_ROLE)
        return {"kernel": scale * jax.random.normal(role, (width, 1), self.compute.param_dtype)}

    def _state(self, key: jax.Array, params: Variables, optimizer: Optimizer) -> TrainState:
        if self.head == "score" and "score_head" not in params:
            params = params | {"score_head": self._score_head(key)}
        variables: Variables = {"params": params}
        if self.section.lora is not None:
            role = jax.random.fold_in(key, _ADAPTERS_ROLE)
            variables["lora"] = init_adapters(role, self.cfg, self.section.lora)
        if self.section.frozen_as_computed:
            trained, frozen = split(variables, self.is_trained)
            dtype = self.compute.compute_dtype
            stored = store_as_computed(frozen, dtype, keep_lm_head=self.cfg.norm_head)
            # A tied head reads the table as the embedding does: cast.
            variables = join(trained, stored)
        return new_state(variables, is_trained=self.is_trained, optimizer=optimizer, key=key)


def open_model(
    section: ModelConfig,
    compute: ComputeConfig,
    *,
    head: Head = "lm",
    head_init: float = 0.01,
    head_only: bool = False,
) -> InitialModel:
    """Finds the model and reads its config, not its weights.

    Args:
        section: which model.
        compute: how it is computed.
        head: what it predicts, tokens (`lm`) or a score.
        head_init: see `InitialModel`.
        head_only: see `InitialModel`.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: there is no such preset, the config is not one this project can do, or the model
            scores and tokens are wanted.
    """
    info = None
    if section.directory is not None:
        info = models.find_model(
            section.directory, ignore_config_fields=section.ignore_config_fields
        )
        if head == "lm" and info.head != "lm":
            raise ValueError(
                f"model.directory={section.directory}: this model scores; a policy needs a token "
                "head"
            )
        cfg = info.cfg
    elif section.preset is not None:
        cfg = preset(section.preset)
    else:
        assert section.backbone is not None
        cfg = section.backbone
    return InitialModel(
        cfg, section, compute, info, head=head, head_init=head_init, head_only=head_only
    )


def talk_of(
    template: ChatTemplate,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    stop_token_ids: tuple[int, ...],
    cfg: BackboneConfig,
) -> Talk:
    """Returns what is written beside a model that is used in a chat template.

    Args:
        template: of its dialogues.
        tokenizer: the model's.
        stop_token_ids: all that end an answer, see `generation_config.stop_token_ids`.
        cfg: the model.
    """
    exported = exported_tokenizer(template, tokenizer, model_type=exported_layout(cfg))
    return Talk(
        tokenizer=None if exported is tokenizer else exported,
        chat_template=exported_source(template, exported),
        stop_token_ids=stop_token_ids,
        vocab_size=cfg.vocab_size,
    )


def exported_tokenizer(
    template: ChatTemplate, tokenizer: "PreTrainedTokenizerBase", *, model_type: str
) -> "PreTrainedTokenizerBase":
    """Returns a tokenizer that reads a template's text as training does, where possible.

    Dialogues that are rendered here have the same tokens with either. The template's control tokens
    become special ones. Where tokens would reach over the border of two turns, texts are split
    before the marks of the turns, unless the tokenizer's class forgets that beside the model.

    Args:
        template: of the dialogues.
        tokenizer: the model's; it is left as it is, and returned where nothing has to change.
        model_type: of the exported model.
    """
    special = unread_tokens(template, tokenizer)
    exported = tokenizers.with_special_tokens(tokenizer, special)
    if not (template.turn_marks and exported.is_fast) or gives_the_tokens(template, exported):
        return exported
    split = tokenizers.with_splits_before(exported, template.turn_marks)
    fits = gives_the_tokens(template, split) and tokenizers.loads_beside(split, model_type)
    return split if fits else exported
