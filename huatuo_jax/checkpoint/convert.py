"""Converts a model between Hugging Face's form and ours, and verifies the result.

The verification runs the same text through transformers and through ours.
"""

import dataclasses
import importlib.util
import pathlib
import tempfile
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from huatuo_jax.backbone.config import BackboneConfig, ComputeConfig
from huatuo_jax.backbone.transformer import Transformer
from huatuo_jax.checkpoint.models import (
    Form,
    ModelInfo,
    find_folder,
    find_model,
    load_params,
    save_orbax,
)
from huatuo_jax.core import sharding
from huatuo_jax.core.files import local_copy
from huatuo_jax.core.sharding import OnMesh
from huatuo_jax.hf import tokenizer
from huatuo_jax.hf.config import exported_layout
from huatuo_jax.hf.export import export_model
from huatuo_jax.hf.load import Progress
from huatuo_jax.hf.tokenizer import SideFiles, holds_tokenizer

SAMPLE_TEXT = (
    "病人：医生您好，我这两天嗓子疼，有点低烧，需要吃药吗？ "
    "医生：您好，先多喝水、注意休息；如果体温超过38.5度或三天不退，请到医院就诊。 "
    "A sore throat with mild fever usually gets better within a week."
)
TOLERANCE = 1e-4  # of the outputs' range, both sides in float32
_NUM_BEGINNINGS = 8


@dataclasses.dataclass(frozen=True)
class Agreement:
    """The differences between two computations of the same logits (or scores).

    Attributes:
        num_tokens: length of the text.
        max_difference: largest absolute difference of two outputs.
        output_range: largest minus smallest output.
        max_kl: largest KL divergence of a next-token distribution, in nats; None for scores.
    """

    num_tokens: int
    max_difference: float
    output_range: float
    max_kl: float | None

    @property
    def holds(self) -> bool:
        """Returns whether the difference is one of rounding."""
        return self.max_difference <= TOLERANCE * self.output_range

    def __str__(self) -> str:
        """Returns one readable line."""
        kl = "" if self.max_kl is None else f", KL {self.max_kl:.2e} nats"
        return (
            f"{self.num_tokens} tokens, maximum difference {self.max_difference:.2e} "
            f"of a range of {self.output_range:.2f}{kl}"
        )


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
) -> Agreement | None:
    """Converts a Hugging Face model to an Orbax directory, or the other way round.

    The conversion uses the host's memory only, even on a machine with accelerators.

    Args:
        source: a folder of either form, or a hub id.
        target: the folder to make.
        dtype: of the weights; None keeps the stored one.
        delta_base: the base, if the source holds delta weights; its tokenizer is used if the delta
            has none.
        ignore_config_fields: see `find_model`; they are left out of the target's config.
        max_shard_size: of a weights file in Hugging Face's form.
        overwrite: replace a target that is not empty.
        verify: compare the logits of both sides on a sample text.
        on_progress: called with tensors done and tensors in all, while a checkpoint is read.

    Returns:
        The differences between both sides if `verify` is set.

    Raises:
        ValueError: the source cannot be converted so, or the sides do not agree.
        OSError: the source cannot be read or the target not be written.
    """
    model = find_model(source, ignore_config_fields=ignore_config_fields)
    to_orbax = model.form == "hugging_face"
    if verify and delta_base is not None:
        raise ValueError("--verify: delta weights have no counterpart in transformers to compare")
    if verify:
        check_can_verify(model)
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
    del params  # The comparison needs two models in memory already.
    if not verify:
        return None
    ours, theirs = (target, model.folder) if to_orbax else (model.folder, target)
    agreement = compare_with_transformers(find_model(ours), theirs)
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
    """Writes a loaded model in either form.

    Args:
        params: its parameters, every shard on this host.
        model: their source.
        target: the folder to make.
        form: of the target.
        side_files: the files beside the weights.
        max_shard_size: of a weights file in Hugging Face's form.
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


def check_can_verify(model: ModelInfo) -> None:
    """Raises ValueError, before any work, if transformers has no class to compare with."""
    theirs = model.layout or exported_layout(model.cfg)
    if theirs == "baichuan":
        raise ValueError(
            "--verify: transformers has no class for model_type 'baichuan' (theirs is remote "
            "code); Baichuan-7B can be verified on the way back, when it is exported as LLaMA"
        )
    if importlib.util.find_spec("torch") is None:
        raise ValueError("--verify needs PyTorch: pip install 'huatuo_jax[verify]'")


def compare_with_transformers(model: ModelInfo, folder: pathlib.Path) -> Agreement:
    """Runs one text through both sides in float32 on the CPU, one model in memory at a time.

    Args:
        model: our side, in either form.
        folder: a Hugging Face folder of the same model.
    """
    tokens_T = _sample_tokens(folder, model.cfg)
    if model.head == "score":
        return _compare_scores(model, folder, tokens_T)
    theirs_TV = _their_logits(folder, tokens_T)
    ours_TV = _our_outputs(model, tokens_T, "logits")[:, : model.cfg.vocab_size]
    kl_T = (jax.nn.softmax(theirs_TV) * (_log_softmax(theirs_TV) - _log_softmax(ours_TV))).sum(-1)
    return Agreement(
        num_tokens=len(tokens_T),
        max_difference=float(np.abs(ours_TV - theirs_TV).max()),
        output_range=float(theirs_TV.max() - theirs_TV.min()),
        max_kl=float(kl_T.max()),
    )


def _compare_scores(model: ModelInfo, folder: pathlib.Path, tokens_T: np.ndarray) -> Agreement:
    """Compares scores of the text's beginnings: transformers gives only the last token's."""
    lengths = np.unique(np.linspace(1, len(tokens_T), _NUM_BEGINNINGS, dtype=int))
    theirs = _load_theirs("AutoModelForSequenceClassification", folder)
    theirs_B = np.array([_run(theirs, tokens_T[:length])[0, 0] for length in lengths])
    del theirs
    ours_B = _our_outputs(model, tokens_T, "scores")[lengths - 1]
    return Agreement(
        num_tokens=len(tokens_T),
        max_difference=float(np.abs(ours_B - theirs_B).max()),
        output_range=float(theirs_B.max() - theirs_B.min()),
        max_kl=None,
    )


def _sample_tokens(folder: pathlib.Path, cfg: BackboneConfig) -> np.ndarray:
    """Returns the sample text's ids, or without a tokenizer ids spread over the vocabulary."""
    if tokenizer.holds_tokenizer(folder):
        ids = tokenizer.load_tokenizer(folder).encode(SAMPLE_TEXT)
    else:
        ids = np.linspace(0, cfg.vocab_size - 1, len(SAMPLE_TEXT)).astype(int)
    return np.asarray(ids, dtype=np.int32)[: cfg.max_positions]


def _their_logits(folder: pathlib.Path, tokens_T: np.ndarray) -> np.ndarray:
    return _run(_load_theirs("AutoModelForCausalLM", folder), tokens_T)[0]


def _load_theirs(kind: str, folder: pathlib.Path) -> Any:
    """Loads a transformers model in float32, without a progress bar."""
    import transformers

    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        return getattr(transformers, kind).from_pretrained(local_copy(folder), dtype="float32")
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


def _run(model: Any, tokens_T: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model.eval()(torch.tensor(tokens_T, dtype=torch.long)[None]).logits.numpy()


def _our_outputs(model: ModelInfo, tokens_T: np.ndarray, method: str) -> np.ndarray:
    mesh = sharding.host_mesh()
    params = load_params(model, mesh=mesh, dtype=jnp.float32)
    module = Transformer(model.cfg, ComputeConfig())

    def forward(params: Mapping[str, Any], tokens_BT: jax.Array) -> jax.Array:
        hidden_BTD = module.apply({"params": params}, tokens_BT)
        return module.apply({"params": params}, hidden_BTD, method=method)

    with jax.default_matmul_precision("highest"):
        outputs = OnMesh(jax.jit(forward), mesh)(params, tokens_T[None, :])
    return np.asarray(outputs[0])


def _log_softmax(logits_TV: np.ndarray) -> np.ndarray:
    return np.asarray(jax.nn.log_softmax(logits_TV))


def _side_files(model: ModelInfo, delta_base: str | None) -> SideFiles:
    """Returns the source's side files; a delta brings its own vocabulary and config."""
    tokenizer_folder = None
    if delta_base is not None and not holds_tokenizer(model.folder):
        base = find_folder(delta_base)
        tokenizer_folder = base if holds_tokenizer(base) else None
    return SideFiles(
        model_folder=model.folder,
        tokenizer_folder=tokenizer_folder,
        ignored_fields=model.ignored_fields,
    )
