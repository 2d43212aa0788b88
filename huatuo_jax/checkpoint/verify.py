"""Proof that a conversion kept the model: the same text through transformers and through ours."""

import dataclasses
import importlib.util
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from huatuo_jax import sharding
from huatuo_jax.backbone.config import BackboneConfig, ComputeConfig
from huatuo_jax.backbone.transformer import Transformer
from huatuo_jax.checkpoint import tokenizer
from huatuo_jax.checkpoint.hf_export_config import exported_layout
from huatuo_jax.checkpoint.models import ModelInfo, load_params
from huatuo_jax.sharding import OnMesh

SAMPLE_TEXT = (
    "病人：医生您好，我这两天嗓子疼，有点低烧，需要吃药吗？ "
    "医生：您好，先多喝水、注意休息；如果体温超过38.5度或三天不退，请到医院就诊。 "
    "A sore throat with mild fever usually gets better within a week."
)
TOLERANCE = 1e-4  # of the outputs' range, both sides in float32
_NUM_BEGINNINGS = 8


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How far two computations of the same logits (or scores) lie apart.

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
        """Whether the difference is one of rounding."""
        return self.max_difference <= TOLERANCE * self.output_range

    def __str__(self) -> str:
        """One line for people."""
        kl = "" if self.max_kl is None else f", KL {self.max_kl:.2e} nats"
        return (
            f"{self.num_tokens} tokens, maximum difference {self.max_difference:.2e} "
            f"of a range of {self.output_range:.2f}{kl}"
        )


def check_can_verify(model: ModelInfo) -> None:
    """Raise ValueError, before any work, where transformers has no class to compare with."""
    theirs = model.layout or exported_layout(model.cfg)
    if theirs == "baichuan":
        raise ValueError(
            "--verify: transformers has no class for model_type 'baichuan' (theirs is remote "
            "code); Baichuan-7B can be verified on the way back, when it is exported as LLaMA"
        )
    if importlib.util.find_spec("torch") is None:
        raise ValueError("--verify needs PyTorch: pip install 'huatuo_jax[verify]'")


def compare_with_transformers(model: ModelInfo, folder: pathlib.Path) -> Agreement:
    """Run one text through both sides in float32 on the CPU, one model in memory at a time.

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
    """Scores of the text's beginnings, since transformers gives only that of the last token."""
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
    """The sample text's ids, or ids spread over the vocabulary where there is no tokenizer."""
    if tokenizer.holds_tokenizer(folder):
        ids = tokenizer.load_tokenizer(folder).encode(SAMPLE_TEXT)
    else:
        ids = np.linspace(0, cfg.vocab_size - 1, len(SAMPLE_TEXT)).astype(int)
    return np.asarray(ids, dtype=np.int32)[: cfg.max_positions]


def _their_logits(folder: pathlib.Path, tokens_T: np.ndarray) -> np.ndarray:
    return _run(_load_theirs("AutoModelForCausalLM", folder), tokens_T)[0]


def _load_theirs(kind: str, folder: pathlib.Path) -> Any:
    """A model of transformers in float32, without its progress bar, which nobody asked for."""
    import transformers

    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        return getattr(transformers, kind).from_pretrained(folder, dtype="float32")
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
