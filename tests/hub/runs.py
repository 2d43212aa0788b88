"""A tiny run with a finished export and data of all three kinds, without the training."""

import json
import pathlib

import jax

from huatuo_jax.backbone.config import ComputeConfig
from huatuo_jax.backbone.transformer import init_params
from huatuo_jax.checkpoint import models
from huatuo_jax.checkpoint.convert import convert
from huatuo_jax.core.files import write_rows
from huatuo_jax.data.records import Comparison, Message, Prompt, answer
from huatuo_jax.preferences.label import LabelRun, run_labels
from huatuo_jax.recipe.recipe import Journal
from huatuo_jax.reward.export import export_reward_model
from tests.recipe.tiny import BACKBONE
from tests.tiny import TOKENIZER

CARD = "---\nlicense: mit\nlibrary_name: transformers\n---\n\n# A policy\n"
SHARD_BYTES = 40_000


def write_export(folder: pathlib.Path) -> None:
    """Policy and reward model as the recipe exports them, the policy in several files."""
    for seed, (name, head) in enumerate({"policy": "lm", "reward": "score"}.items()):
        params = init_params(jax.random.key(seed), BACKBONE, ComputeConfig(), head=head)
        source = folder / "sources" / name
        models.save_orbax(
            params, BACKBONE, source, head=head, source_folder=pathlib.Path(TOKENIZER)
        )
        target = folder / "export" / name
        if name == "policy":
            convert(str(source), target, max_shard_size=SHARD_BYTES)
            (target / "README.md").write_text(CARD, encoding="utf-8")
        else:
            export_reward_model(str(source), target)
    release = {"policy": "folder", "sentence": "As told.", "decision": None}
    (folder / "export" / "release.json").write_text(json.dumps(release), encoding="utf-8")
    journal = Journal(folder)
    journal.start("export", {}, {})
    journal.finish("export", {})


def write_data(folder: pathlib.Path, *, prompts: int = 3) -> None:
    """Prompts, two answers to each, labels of the offline judge, comparisons."""
    asked = [
        Prompt(
            id=f"p{index}",
            messages=(Message("user", f"头痛{index}天了，怎么办？"),),
            source="a clinic" if index else "a book",
            reference="请多休息。" if index else None,
            extra={"ward": index},
        )
        for index in range(prompts)
    ]
    write_rows(folder / "prompts.jsonl", (one.to_json() for one in asked))
    texts = ("您好，建议多休息，多喝水；三天不好，请到神经内科就诊。", "不知道。")
    rows = [{**one.to_json(), "answers": [{"text": text} for text in texts]} for one in asked]
    write_rows(folder / "answers.jsonl", rows)
    labels = str(folder / "labels.jsonl")
    run_labels(LabelRun(answers=str(folder / "answers.jsonl"), output=labels), lambda _: None)
    pairs = [
        Comparison(
            id=f"{one.id}:0-1",
            messages=one.messages,
            chosen=answer(texts[0]),
            rejected=answer(texts[1]),
            source=one.source,
            p_chosen=0.75,
            margin=None if one.id == "p0" else 1,
            extra={"chosen_token_ids": [1, 2]},
        )
        for one in asked
    ]
    write_rows(folder / "comparisons.jsonl", (pair.to_json() for pair in pairs))
    journal = Journal(folder)
    settings = {"model": "a judge", "label": {"protocol": "score"}}
    journal.start("labels", settings, {})
    journal.finish("labels", {})


def write_litter(folder: pathlib.Path) -> list[pathlib.Path]:
    """What a run has and nobody is to get, beside the export and inside it."""
    litter = [
        "sft/checkpoints/4/state/optimizer.bin",
        "sft/metrics.jsonl",
        "compiled/program.xla",
        "data/cache.array_record",
        "answers.jsonl.settings.json",
        "labels.jsonl.spending.jsonl",
        "environment.json",
        "export/policy/optimizer.safetensors",
        "export/policy/optimizer.json",
        "export/policy/.cache/huggingface/upload.lock",
        "export/policy/checkpoint-4/model.safetensors",
        "export/policy/recipe.json",
        "export/reward/trainer_state.json",
    ]
    paths = [folder / name for name in litter]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("litter", encoding="utf-8")
    return paths
