"""Makes a run's training and held-out prompts from files or from its dialogues."""

import dataclasses
import itertools
import pathlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from huatuo_jax.core.files import write_rows
from huatuo_jax.data.accounting import HELD_OUT, READ_FROM, TRAINED_ON, Account, placed
from huatuo_jax.data.mixture import chosen_by_content, dialogue_text
from huatuo_jax.data.readers import read_dialogues, read_prompts
from huatuo_jax.data.records import Dialogue, Prompt
from huatuo_jax.recipe.config import PromptsConfig
from huatuo_jax.training.dialogue_data import DataConfig, SourceConfig

TRAIN_FILE = "prompts.jsonl"
ACCOUNT_FILE = "prompts.jsonl.report.json"


OTHER_KIND = "of kinds that prompts.kinds does not name"
NOT_TO_LEARN = "all its answers are marked as not to be trained"
REPEATED = "the same prompt again"
IN_BOTH = "held out, but to train on too"
FOR_JUDGINGS = "held out for the judgings of PPO"
OF_FILES = "of the side whose prompts are of files"

_SHOWN = 3


class Prompts(NamedTuple):
    """The prompts of a run, and the account of its dialogues.

    Attributes:
        train: to learn from.
        held_out: to evaluate on.
        judged: held-out ones by which PPO chooses its policy; they are not used in the evaluation.
        account: rows read, used and left out.
    """

    train: list[Prompt]
    held_out: list[Prompt]
    judged: list[Prompt]
    account: Account


def make_prompts(data: DataConfig, cfg: PromptsConfig, *, num_judged: int | None = 0) -> Prompts:
    """Reads the prompts from files, or makes them of the dialogues for a side without files.

    A dialogue that fine-tuning holds out makes a held-out prompt, unless the same prompt stands
    among those to learn from, too. Each prompt says in `READ_FROM` where it or its dialogue stands.

    Args:
        data: the dialogues.
        cfg: selects the prompts.
        num_judged: held-out prompts to set aside for PPO's judgings, a third of them at most;
            None for a third, 0 for none.

    Raises:
        ValueError: an unreadable file, no prompt on one of the sides, a single held-out one where
            some are set aside, or the same prompt on both sides where one of them is of files.
    """
    train: dict[str, Prompt] = {}
    held_out: dict[str, Prompt] = {}
    ids: set[str] = set()
    of_files = [(cfg.files, train), (cfg.held_out_files, held_out)]
    given = [side for files, side in of_files if files is not None]
    account = Account(("dialogues", "dialogues and prompts", "prompts")[len(given)])
    for files, side in of_files:
        if files is not None:
            _read_files(files.split(","), side, ids, account)
    if len(given) < len(of_files):
        _add_dialogues(data, cfg, train, held_out, ids, account)
    shared = [key for key in held_out if key in train]
    if shared and given:
        places = "; ".join(
            f"{held_out[key].extra[READ_FROM]} is {train[key].extra[READ_FROM]}"
            for key in shared[:_SHOWN]
        )
        raise ValueError(
            f"{len(shared)} of {len(held_out)} held-out prompts are among those to learn from, "
            f"such as {places}: take them out of prompts.files or prompts.held_out_files"
        )
    for key in shared:
        account.leave_out(IN_BOTH, str(held_out.pop(key).extra[READ_FROM]))
    for name, files, found in (
        ("to learn from", cfg.files, train),
        ("held out", cfg.held_out_files, held_out),
    ):
        if found:
            continue
        if files is not None:
            raise ValueError(f"{files}: no prompt {name}")
        read = ", ".join(itertools.chain(*(source.paths for source in data.sources)))
        raise ValueError(
            f"{read}: no prompt {name} comes of these dialogues (prompts.kinds={cfg.kinds}, "
            f"sft.data.held_out.share={data.held_out.share})"
        )
    judged = _set_aside(list(held_out.values()), num_judged)
    for prompt in judged:
        del held_out[_content(prompt)]
    limited = Prompts(
        chosen_by_content(list(train.values()), cfg.limit, text=_content),
        chosen_by_content(list(held_out.values()), cfg.held_out_limit, text=_content),
        judged,
        account,
    )
    account.put_aside(FOR_JUDGINGS, len(judged))
    for purpose, found, kept, name in (
        (TRAINED_ON, train, limited.train, "limit"),
        (HELD_OUT, held_out, limited.held_out, "held_out_limit"),
    ):
        account.use(purpose, len(kept))
        account.put_aside(f"over prompts.{name}", len(found) - len(kept))
    return limited


def _set_aside(held_out: list[Prompt], num_judged: int | None) -> list[Prompt]:
    """Chooses the held-out prompts on which PPO is judged while it trains."""
    if num_judged == 0:
        return []
    if len(held_out) < 2:
        raise ValueError(
            "there is 1 held-out prompt, and ppo.judging and evaluation need one each: hold out "
            "more, or leave out ppo.judging"
        )
    at_most = max(1, len(held_out) // 3)
    number = at_most if num_judged is None else min(num_judged, at_most)
    return chosen_by_content(held_out, number, text=_content)


def write_prompts(path: pathlib.Path, prompts: Iterable[Prompt]) -> None:
    """Writes a file of prompts whole or not at all."""
    write_rows(path, (prompt.to_json() for prompt in prompts))


def _read_files(
    paths: Iterable[str], side: dict[str, Prompt], ids: set[str], account: Account
) -> None:
    """Adds the prompts of files to a side."""
    for path in paths:
        reading = read_prompts(path)
        for place, prompt in placed(reading):
            _add(prompt, pathlib.Path(place).name, pathlib.Path(path).stem, side, ids, account)
        account.add_rows(reading)


def _add_dialogues(
    data: DataConfig,
    cfg: PromptsConfig,
    train: dict[str, Prompt],
    held_out: dict[str, Prompt],
    ids: set[str],
    account: Account,
) -> None:
    """Adds the prompts of the dialogues to each side that is not of files."""
    for source, dialogue, place in _dialogues(data, account):
        if dialogue.kind is not None and dialogue.kind not in cfg.kinds:
            account.put_aside(OTHER_KIND)
            continue
        if not any(message.trained for message in dialogue.messages if message.role == "assistant"):
            account.leave_out(NOT_TO_LEARN, place)
            continue
        is_held_out = _is_held_out(source, dialogue, data)
        if (cfg.held_out_files if is_held_out else cfg.files) is not None:
            account.put_aside(OF_FILES)
            continue
        side = held_out if is_held_out else train
        _add(_prompt(dialogue), place, source.name, side, ids, account)


def _add(
    prompt: Prompt,
    place: str,
    source: str,
    side: dict[str, Prompt],
    ids: set[str],
    account: Account,
) -> None:
    """Adds a prompt once, under an id of its own, with the place where it stands."""
    key = dialogue_text(prompt.messages)
    if key in side:
        account.leave_out(REPEATED, place)
        return
    name = f"{source}:{prompt.id}" if prompt.id in ids else prompt.id
    ids.add(name)
    extra = {**prompt.extra, READ_FROM: place}
    side[key] = dataclasses.replace(prompt, id=name, extra=extra)


def _dialogues(data: DataConfig, account: Account) -> Iterator[tuple[SourceConfig, Dialogue, str]]:
    """Yields each dialogue with its source, and the name and line of its file."""
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


def _prompt(dialogue: Dialogue) -> Prompt:
    """Returns the prompt of the doctor's longest answer, with that answer as the reference.

    Answers that are marked as not to be learned from are no references. The last answer of a
    conversation is often a goodbye, which teaches nothing.
    """
    _, index = max(
        (len(message.content), -index)
        for index, message in enumerate(dialogue.messages)
        if message.role == "assistant" and index and message.trained
    )
    return Prompt.of_dialogue(
        dataclasses.replace(dialogue, messages=dialogue.messages[: 1 - index])
    )


def _content(prompt: Prompt) -> str:
    return dialogue_text(prompt.messages)
