"""Exports a run's policy and reward model to Hugging Face format, and compares them read back."""

import dataclasses
import importlib.util
import json
import pathlib
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from huatuo_jax.backbone.config import BackboneConfig
from huatuo_jax.checkpoint import models
from huatuo_jax.checkpoint.convert import Agreement, compare_with_transformers
from huatuo_jax.checkpoint.models import CARD_FILE, ModelInfo
from huatuo_jax.core import sharding
from huatuo_jax.core.files import as_path, write_file
from huatuo_jax.data.chat.template import ChatTemplate
from huatuo_jax.data.chat.tokenizer_template import gives_the_tokens_of_training
from huatuo_jax.evaluation.answers import sampling_of
from huatuo_jax.evaluation.release import Candidate
from huatuo_jax.generation.requests import SamplingConfig
from huatuo_jax.hf.config import exported_layout
from huatuo_jax.hf.export import export_model
from huatuo_jax.hf.generation_config import set_sampling, stop_token_ids
from huatuo_jax.hf.tokenizer import load_tokenizer
from huatuo_jax.ppo.rewards import AnswerScoreConfig
from huatuo_jax.recipe.config import HELD_OUT_FILE, RELEASED, RlaifConfig
from huatuo_jax.recipe.model_cards import find_origin, policy_card, reward_card
from huatuo_jax.recipe.prompts import TRAIN_FILE
from huatuo_jax.report.run import read_json, read_run
from huatuo_jax.reward.export import export_reward_model
from huatuo_jax.training.initial_model import ModelConfig, talk_of
from huatuo_jax.training.scoring import load_normalization

_MODELS = ("policy", "reward")

RELEASE_FILE = "release.json"
"""Beside the exported models: which policy it is, and why."""


class Policy(NamedTuple):
    """The policy that is exported to `export/policy`.

    Attributes:
        name: of the evaluation's model; `folder` for one from elsewhere.
        source: its folder.
        release: the content of `release.json`.
        template: of the run; None for a model from elsewhere, which keeps its own.
        sampling: of the evaluation.
    """

    name: Candidate | Literal["folder"]
    source: str
    release: dict[str, Any]
    template: ChatTemplate | None = None
    sampling: SamplingConfig | None = None


def choose_policy(cfg: RlaifConfig, evaluation: pathlib.Path | None) -> Policy:
    """Returns the policy that the evaluation has chosen, or that the config names.

    Args:
        cfg: in its workdir.
        evaluation: `evaluation.json`; None where the recipe runs without an evaluation.

    Raises:
        ValueError: the evaluation is not JSON.
    """
    decision = None if evaluation is None else read_json(evaluation)["release"]
    choice = cfg.export.choice
    name: Candidate | Literal["folder"]
    if choice == RELEASED:
        assert decision is not None
        name, sentence = decision["pick"], decision["reason"]
    else:
        name = choice
        sentence = f"config.export.policy={cfg.export.policy!r} is exported, as the config says"
        sentence += "." if decision is None else f"; the evaluation's own: {decision['reason']}"
    release = {"policy": name, "sentence": sentence, "decision": decision}
    if name == "folder":
        return Policy(name, cfg.export.policy, release)
    if name == "best_of_n":
        release["best_of_n"] = {
            "n": cfg.evaluation.num_candidates,
            "temperature": cfg.evaluation.temperature,
            "max_new_tokens": cfg.evaluation.max_new_tokens,
            "score": dataclasses.asdict(cfg.evaluation.score or AnswerScoreConfig()),
        }
    template = cfg.sft.data.chat_template
    return Policy(name, cfg.candidates[name], release, template, sampling_of(cfg.evaluation))


def run_export(cfg: RlaifConfig, chosen: Policy, folder: pathlib.Path) -> dict[str, Any]:
    """Writes `policy/`, `reward/` with their cards, and `release.json`, and checks the models.

    This needs host memory, twice the larger of the two, and no accelerator memory. Both are
    read back and must be the weights they came from, bit for bit; where PyTorch is installed,
    transformers must give the same logits and scores up to rounding.

    Args:
        cfg: in its workdir.
        chosen: the policy.
        folder: `export` in the run's folder, whose files the cards describe.

    Returns:
        The policy's name, and for each model the number of weights and transformers' agreement.

    Raises:
        ValueError: a model that Hugging Face's format cannot hold, or an export that differs.
        OSError: something cannot be read or written.
    """
    policy, reward = folder / "policy", folder / "reward"
    # An interrupted export must leave no release file of an earlier one.
    (folder / RELEASE_FILE).unlink(missing_ok=True)
    dtype = cfg.export.dtype
    export_policy(chosen, policy, dtype=dtype)
    export_reward_model(cfg.export.reward, reward, dtype=dtype, overwrite=True)
    found: dict[str, Any] = {
        "released": chosen.name,
        "policy": _checked(chosen.source, policy, dtype),
        "reward": _checked(cfg.export.reward, reward, dtype),
    }
    _write_cards(cfg, chosen, folder, {name: found[name]["weights"] for name in _MODELS})
    text = json.dumps(chosen.release, ensure_ascii=False, indent=2)
    write_file(folder / RELEASE_FILE, f"{text}\n")
    return found


def export_policy(chosen: Policy, target: pathlib.Path, *, dtype: str | None = None) -> None:
    """Writes a policy for transformers and the servers that read its format, ready for chat.

    The chat template, the special tokens that it needs, the ids that end an answer and the sampling
    are those of the run, whatever the source's folder says.

    Args:
        chosen: the policy.
        target: the folder to make, or to replace.
        dtype: of the weights; None keeps the stored one.

    Raises:
        ValueError: a model that Hugging Face's format cannot hold.
        OSError: something cannot be read or written.
    """
    info = models.find_model(chosen.source)
    export_model(
        models.load_params(info, mesh=sharding.host_mesh(), dtype=dtype),
        info.cfg,
        target,
        head=info.head,
        source_folder=info.folder,
        ignored_fields=info.ignored_fields,
        overwrite=True,
    )
    if chosen.template is not None:
        _set_talk(target, chosen.template, info.cfg)
    if chosen.sampling is not None:
        set_sampling(
            target,
            temperature=chosen.sampling.temperature,
            top_p=chosen.sampling.top_p,
            top_k=chosen.sampling.top_k,
            max_new_tokens=chosen.sampling.max_new_tokens,
            vocab_size=info.cfg.vocab_size,
        )


def _write_cards(
    cfg: RlaifConfig, chosen: Policy, folder: pathlib.Path, num_weights: Mapping[str, int]
) -> None:
    run, workdir = read_run(folder.parent), folder.parent
    prompts = [workdir / TRAIN_FILE, workdir / HELD_OUT_FILE]
    origin = find_origin(
        cfg.sft.model,
        cfg.sft.data.sources,
        prompts,
        license=cfg.export.license,
        languages=cfg.export.languages,
        is_clinic=cfg.clinic is not None,
    )
    policy_origin = origin
    if chosen.name == "folder":
        model = ModelConfig(directory=chosen.source)
        policy_origin = origin.of_model(model, license=cfg.export.license, has_data=False)
    template = load_tokenizer(folder / "policy").chat_template
    card = policy_card(
        run,
        chosen.release,
        policy_origin,
        title=cfg.report.title,
        num_weights=num_weights["policy"],
        num_samples=cfg.export.card_samples,
        same_tokens=template is not None and gives_the_tokens_of_training(template),
    )
    write_file(folder / "policy" / CARD_FILE, card)
    is_of_run = as_path(cfg.export.reward) == workdir / "reward" / "model"
    begun = cfg.reward.model if is_of_run else ModelConfig(directory=cfg.export.reward)
    if begun.directory is None or as_path(begun.directory) != workdir / "sft" / "model":
        origin = origin.of_model(begun, license=cfg.export.license, has_data=is_of_run)
    card = reward_card(
        run,
        origin,
        load_normalization(folder / "reward"),
        title=cfg.report.title,
        num_weights=num_weights["reward"],
        is_of_run=is_of_run,
    )
    write_file(folder / "reward" / CARD_FILE, card)


def _set_talk(folder: pathlib.Path, template: ChatTemplate, cfg: BackboneConfig) -> None:
    tokenizer = load_tokenizer(folder)
    stops = stop_token_ids(
        folder,
        tokenizer,
        of_template=template.stop_token_ids(tokenizer),
        vocab_size=cfg.vocab_size,
    )
    talk_of(template, tokenizer, stop_token_ids=stops, cfg=cfg).write(folder)


def _checked(source: str, target: pathlib.Path, dtype: str | None) -> dict[str, Any]:
    ours, theirs = models.find_model(source), models.find_model(target)
    found: dict[str, Any] = {
        "weights": _count_equal_weights(ours, theirs, dtype),
        "read_back": "equal bit for bit",
    }
    if importlib.util.find_spec("torch") is None or exported_layout(ours.cfg) == "baichuan":
        return found | {"transformers": None}
    agreement: Agreement = compare_with_transformers(theirs, target)
    if not agreement.holds:
        raise ValueError(f"{target}: written, but transformers computes otherwise: {agreement}")
    return found | {
        "transformers": {
            "max_difference": agreement.max_difference,
            "output_range": agreement.output_range,
            "num_tokens": agreement.num_tokens,
        }
    }


def _count_equal_weights(ours: ModelInfo, theirs: ModelInfo, dtype: str | None) -> int:
    """Counts the weights of two models, which must be equal bit for bit."""
    mesh = sharding.host_mesh()
    saved = models.load_params(ours, mesh=mesh, dtype=dtype)
    read = models.load_params(theirs, mesh=mesh)
    same = jax.tree.map(lambda one, other: bool(np.array_equal(one, other)), saved, read)
    if not all(jax.tree.leaves(same)):
        raise ValueError(
            f"{theirs.folder}: written, but its weights are not those of {ours.folder}"
        )
    return sum(leaf.size for leaf in jax.tree.leaves(read))
