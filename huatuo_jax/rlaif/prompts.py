"""Prompts made of the run's dialogues: some to learn from, and held-out ones to evaluate on."""

import dataclasses
import itertools
import pathlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from huatuo_jax.data.accounting import HELD_OUT, READ_FROM, TRAINED_ON, Account
from huatuo_jax.data.held_out import chosen_by_content, dialogue_text
from huatuo_jax.data.readers import read_dialogues
from huatuo_jax.data.records import Dialogue, Prompt
from huatuo_jax.json_lines import write_rows
from huatuo_jax.rlaif.config import PromptsConfig
from huatuo_jax.training.dialogue_data import DataConfig, SourceConfig

TRAIN_FILE = "prompts.jsonl"
ACCOUNT_FILE = "prompts.jsonl.report.json"


OTHER_KIND = "of kinds that prompts.kinds does not name"
NOT_TO_LEARN = "all its answers are marked as not to be trained"
REPEATED = "the same prompt again"
IN_BOTH = "held out, but to train on too"


class Prompts(NamedTuple):
    """The prompts of a run, and what became of each dialogue."""

    train: list[Prompt]
    held_out: list[Prompt]
    account: Account


def make_prompts(data: DataConfig, cfg: PromptsConfig) -> Prompts:
    """The prompts of all dialogues of the wanted kinds.

    A dialogue that fine-tuning holds out makes a held-out prompt, unless the same prompt stands
    among those to learn from, too. Each prompt says in `READ_FROM` where its dialogue stands.

    Raises:
        ValueError: a file that cannot be read, or no prompt on one of the sides.
    """
    train: dict[str, Prompt] = {}
    held_out: dict[str, Prompt] = {}
    ids: set[str] = set()
    account = Account("dialogues")
    for source, dialogue, place in _dialogues(data, account):
        if dialogue.kind is not None and dialogue.kind not in cfg.kinds:
            account.put_aside(OTHER_KIND)
            continue
        if not any(message.trained for message in dialogue.messages if message.role == "assistant"):
            account.leave_out(NOT_TO_LEARN, place)
            continue
        prompt = _prompt(dialogue, place)
        key = _content(prompt)
        side = held_out if _is_held_out(source, dialogue, data) else train
        if key in side:
            account.leave_out(REPEATED, place)
            continue
        if prompt.id in ids:
            prompt = Prompt(**{**vars(prompt), "id": f"{source.name}:{prompt.id}"})
        ids.add(prompt.id)
        side[key] = prompt
    for key in [key for key in held_out if key in train]:
        account.leave_out(IN_BOTH, str(held_out.pop(key).extra[READ_FROM]))
    for name, found in (("to learn from", train), ("held out", held_out)):
        if not found:
            files = ", ".join(itertools.chain(*(source.paths for source in data.sources)))
            raise ValueError(
                f"{files}: no prompt {name} comes of these dialogues (prompts.kinds={cfg.kinds}, "
                f"sft.data.held_out.share={data.held_out.share})"
            )
    limited = Prompts(
        chosen_by_content(list(train.values()), cfg.limit, text=_content),
        chosen_by_content(list(held_out.values()), cfg.held_out_limit, text=_content),
        account,
    )
    for purpose, found, kept, name in (
        (TRAINED_ON, train, limited.train, "limit"),
        (HELD_OUT, held_out, limited.held_out, "held_out_limit"),
    ):
        account.use(purpose, len(kept))
        account.put_aside(f"over prompts.{name}", len(found) - len(kept))
    return limited


def write_prompts(path: pathlib.Path, prompts: Iterable[Prompt]) -> None:
    """Writes a file of prompts whole or not at all."""
    write_rows(path, (prompt.to_json() for prompt in prompts))


def _dialogues(data: DataConfig, account: Account) -> Iterator[tuple[SourceConfig, Dialogue, str]]:
    """Each dialogue with its source, and the name and line of its file."""
    for source in data.sources:
        for path in source.paths:
            dialogues = read_dialogues(path, **source.reading())
            for dialogue in dialogues:
                # The name alone: where a file lies may differ between two starts of a run.
                yield source, dialogue, f"{pathlib.Path(path).name}:{dialogues.line}"
            account.add_rows(dialogues)


def _is_held_out(source: SourceConfig, dialogue: Dialogue, data: DataConfig) -> bool:
    if source.held_out_by == "hash":
        return data.held_out.holds_out(dialogue_text(dialogue.messages))
    return source.held_out_by == "always"


def _prompt(dialogue: Dialogue, place: str) -> Prompt:
    """What the doctor's longest answer answers, with that answer as the reference.

    Answers that are marked as not to be learned from are no references. The last answer of a
    conversation is often a goodbye, of which nothing can be learned.
    """
    _, index = max(
        (len(message.content), -index)
        for index, message in enumerate(dialogue.messages)
        if message.role == "assistant" and index and message.trained
    )
    cut = dataclasses.replace(
        dialogue,
        messages=dialogue.messages[: 1 - index],
        extra={**dialogue.extra, READ_FROM: place},
    )
    return Prompt.of_dialogue(cut)


def _content(prompt: Prompt) -> str:
    return dialogue_text(prompt.messages)
