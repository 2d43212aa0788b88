"""Prompts made of the run's dialogues: some to learn from, and held-out ones to evaluate on."""

import hashlib
import itertools
import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from huatuo_jax.atomic import write_file
from huatuo_jax.data.held_out import dialogue_text
from huatuo_jax.data.readers import read_dialogues
from huatuo_jax.data.records import Dialogue, Prompt
from huatuo_jax.rlaif.config import PromptsConfig
from huatuo_jax.training.dialogue_data import DataConfig, SourceConfig

TRAIN_FILE = "prompts.jsonl"
HELD_OUT_FILE = "held_out_prompts.jsonl"


class Prompts(NamedTuple):
    """The prompts of a run."""

    train: list[Prompt]
    held_out: list[Prompt]


def make_prompts(data: DataConfig, cfg: PromptsConfig) -> Prompts:
    """The prompts of all dialogues of the wanted kinds.

    A dialogue that fine-tuning holds out makes a held-out prompt, unless the same prompt stands
    among those to learn from, too.

    Raises:
        ValueError: a file that cannot be read, or no prompt on one of the sides.
    """
    train: dict[str, Prompt] = {}
    held_out: dict[str, Prompt] = {}
    ids: set[str] = set()
    for source, dialogue in _dialogues(data):
        if dialogue.kind is not None and dialogue.kind not in cfg.kinds:
            continue
        if not any(message.trained for message in dialogue.messages if message.role == "assistant"):
            continue  # All its answers are marked as not to be learned from.
        prompt = _prompt(dialogue)
        key = dialogue_text(prompt.messages)
        side = held_out if _is_held_out(source, dialogue, data) else train
        if key in side:
            continue
        if prompt.id in ids:
            prompt = Prompt(**{**vars(prompt), "id": f"{source.name}:{prompt.id}"})
        ids.add(prompt.id)
        side[key] = prompt
    held_out = {key: prompt for key, prompt in held_out.items() if key not in train}
    for name, found in (("to learn from", train), ("held out", held_out)):
        if not found:
            files = ", ".join(itertools.chain(*(source.paths for source in data.sources)))
            raise ValueError(
                f"{files}: no prompt {name} comes of these dialogues (prompts.kinds={cfg.kinds}, "
                f"sft.data.held_out.share={data.held_out.share})"
            )
    return Prompts(_limited(train, cfg.limit), _limited(held_out, cfg.held_out_limit))


def write_prompts(path: pathlib.Path, prompts: Iterable[Prompt]) -> None:
    """Writes a file of prompts whole or not at all."""
    lines = (json.dumps(prompt.to_json(), ensure_ascii=False) for prompt in prompts)
    write_file(path, "".join(f"{line}\n" for line in lines))


def _dialogues(data: DataConfig) -> Iterator[tuple[SourceConfig, Dialogue]]:
    for source in data.sources:
        for path in source.paths:
            for dialogue in read_dialogues(path, **source.reading()):
                yield source, dialogue


def _is_held_out(source: SourceConfig, dialogue: Dialogue, data: DataConfig) -> bool:
    if source.held_out_by == "hash":
        return data.held_out.holds_out(dialogue_text(dialogue.messages))
    return source.held_out_by == "always"


def _prompt(dialogue: Dialogue) -> Prompt:
    """What the doctor's longest answer answers, with that answer as the reference.

    Answers that are marked as not to be learned from are no references. The last answer of a
    conversation is often a goodbye, of which nothing can be learned.
    """
    _, index = max(
        (len(message.content), -index)
        for index, message in enumerate(dialogue.messages)
        if message.role == "assistant" and index and message.trained
    )
    cut = Dialogue(**{**vars(dialogue), "messages": dialogue.messages[: 1 - index]})
    return Prompt.of_dialogue(cut)


def _limited(prompts: dict[str, Prompt], limit: int | None) -> list[Prompt]:
    """At most so many in the order given; which ones is told by their content."""
    if limit is None or len(prompts) <= limit:
        return list(prompts.values())
    digests = {
        key: hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest() for key in prompts
    }
    kept = set(sorted(prompts, key=digests.__getitem__)[:limit])
    return [prompt for key, prompt in prompts.items() if key in kept]
