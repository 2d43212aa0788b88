"""Exports a reward model in Hugging Face's form, with its normalization in config and card."""

import json
import pathlib
from collections.abc import Collection
from typing import Any

from huggingface_hub import ModelCardData
from jax.typing import DTypeLike

from huatuo_jax.checkpoint import models
from huatuo_jax.checkpoint.models import CARD_FILE
from huatuo_jax.core import sharding
from huatuo_jax.core.markdown import inline, table
from huatuo_jax.hf.export import export_model
from huatuo_jax.hf.generation_config import CONFIG_FILE
from huatuo_jax.training.scoring import (
    CONFIG_FIELDS,
    Normalization,
    load_normalization,
    save_normalization,
)


def export_reward_model(
    source: str | pathlib.Path,
    target: pathlib.Path,
    *,
    dtype: DTypeLike | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> None:
    """Writes a reward model for transformers' sequence classification.

    The exported model gives raw scores. The normalization is in its config.json
    (`task_specific_params.reward_normalization`), in `reward_normalization.json`, and on the card.

    Args:
        source: a reward model's folder, of either form.
        target: the folder to make, whole or not at all.
        dtype: of the weights; None keeps the stored one.
        max_shard_size: of a weights file.
        overwrite: replace a target that is not empty.

    Raises:
        ValueError: the source is no reward model, or of a family that transformers has no
            classifier for.
        FileExistsError: the target is not empty and `overwrite` is not set.
        OSError: it cannot be written.
    """
    info = models.find_model(source)
    if info.head != "score":
        raise ValueError(f"{source}: this model has a token head, a reward model has a score head")
    normalization = load_normalization(info.folder)
    params = models.load_params(info, mesh=sharding.host_mesh(), dtype=dtype)
    export_model(
        params,
        info.cfg,
        target,
        head="score",
        source_folder=info.folder,
        ignored_fields=info.ignored_fields,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        describe=lambda folder: describe(folder, normalization),
    )


def carry_normalization(
    source: str | pathlib.Path,
    target: pathlib.Path,
    *,
    ignore_config_fields: Collection[str] = (),
) -> None:
    """Passes a reward model's normalization on to what it was converted to, in either form.

    Does nothing for a model with a token head.

    Args:
        source: what was converted.
        target: to what.
        ignore_config_fields: of the source's config, see `models.find_model`.

    Raises:
        ValueError: the normalization cannot be read.
        OSError: it cannot be written.
    """
    info = models.find_model(source, ignore_config_fields=ignore_config_fields)
    if info.head != "score":
        return
    normalization = load_normalization(info.folder)
    if models.find_model(target).form == "hugging_face":
        describe(target, normalization)
    elif normalization is not None:
        save_normalization(target, normalization)


def describe(folder: pathlib.Path, normalization: Normalization | None) -> None:
    """Puts the normalization into an exported folder's config, file and card."""
    path = folder / CONFIG_FILE
    config = json.loads(path.read_text(encoding="utf-8"))
    outer, inner = CONFIG_FIELDS
    params: dict[str, Any] = dict(config.get(outer) or {})
    params.pop(inner, None)
    if normalization is not None:
        params[inner] = normalization.to_json()
        save_normalization(folder, normalization)
    config[outer] = params or None
    if config[outer] is None:
        del config[outer]
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / CARD_FILE).write_text(model_card(normalization), encoding="utf-8")


def model_card(normalization: Normalization | None) -> str:
    """Writes the card of a reward model of which only its folder is known."""
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-classification",
        tags=["reward-model", "medical"],
    )
    return (
        f"---\n{metadata.to_yaml()}\n---\n\n# Reward model\n\n"
        "One score for a dialogue that ends with the doctor: higher is better. Scores tell answers "
        "to the same\nprompt apart. They are no measure of medical correctness, and no advice.\n\n"
        f"{usage(normalization)}\n"
    )


def usage(normalization: Normalization | None) -> str:
    """Describes how to score with an exported reward model, as the sections of a card."""
    return f"{_USAGE}\n\n## Normalization\n\n{_normalization(normalization)}"


def _normalization(found: Normalization | None) -> str:
    if found is None:
        return "None is stored: the scores have no fixed level or scale."
    rows = [
        ["mean", repr(found.mean)],
        ["standard deviation", repr(found.standard_deviation)],
        ["number of answers", str(found.num_answers)],
        ["answers", inline(found.answers)],
    ]
    return (
        "The model gives raw scores. On the answers below they have this mean and standard\n"
        "deviation, so that `(score - mean) / standard_deviation` has mean 0 and standard\n"
        "deviation 1 there. The numbers are in `config.json` too, under\n"
        f"`{'.'.join(CONFIG_FIELDS)}`.\n\n{table(['', ''], rows)}"
    )


USAGE_FOLDER = "MODEL"
"""What stands in a card's lines for the model's folder or the name of its repository."""

_USAGE = """\
## How to score

The score is read at the last token that is not padding, which has to be the end of the doctor's
last turn: the model was trained on dialogues cut right there. Padding uses an id of its own; a
causal model's score does not depend on what is padded after it. Replace `MODEL` by this folder or
by the repository's name.

With transformers:

```python
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("MODEL")
model = AutoModelForSequenceClassification.from_pretrained("MODEL")
messages = [
    {"role": "user", "content": "头痛三天了，怎么办？"},
    {"role": "assistant", "content": "注意休息，多喝水，再痛就去神经内科。"},
]
token_ids = tokenizer.apply_chat_template(messages, return_dict=False)
ends = model.config.eos_token_id
ends = ends if isinstance(ends, list) else [ends]
while token_ids[-1] not in ends:  # Up to the end of the turn.
    token_ids.pop()
score = model(torch.tensor([token_ids])).logits[0, 0].item()
```

With vLLM, `/classify` puts the score through a sigmoid unless told otherwise. Raw scores, which
the normalization below is for, need `use_activation` to be false; the score is
`data[0].probs[0]` of the reply, and `input` are the token ids from above:

```bash
vllm serve MODEL --runner pooling --port 8000
curl http://localhost:8000/classify -H "Content-Type: application/json" -d '{
  "model": "MODEL", "input": [TOKEN_IDS], "use_activation": false
}'
```"""
