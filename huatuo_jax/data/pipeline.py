"""From dialogue files to a cache of tokens: read, split, remove duplicates, tokenise, once.

`prepare` does all of it. The result depends on its inputs alone, so it is made once for each set of
inputs, and found again by any later run or other process. Rows and batches start from it
(`huatuo_jax.data.batches`). The statistics of a cache are counted while it is built and stored
beside it.
"""

import json
import os
import pathlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from huatuo_jax.data.accounting import HELD_OUT, TRAINED_ON, Account
from huatuo_jax.data.mixture import (
    DuplicateReport,
    DuplicatesConfig,
    HeldOutConfig,
    dialogue_text,
    find_duplicates,
)
from huatuo_jax.data.readers import DialogueSource
from huatuo_jax.data.records import Dialogue
from huatuo_jax.data.tokenizing import (
    UNKNOWN_KIND,
    DialogueTokenizer,
    Dropped,
    Entry,
    Example,
    Progress,
    Split,
    TokenDataset,
    Tokens,
    build_once,
    cache_key,
    has_split,
    num_trained,
    tokenize_in_chunks,
    write_examples,
)

_SHOWN = 10  # examples of each problem
_BEGINNING = 60  # characters of a text that is shown
_JUDGED_FROM = 1_000  # dialogues; of fewer, a share of refusals means little
_STATISTICS_FILE = "statistics.json"
REPEATED = "the same dialogue again"
HELD_OUT_TOO = "held out too, word for word"
NEARLY_HELD_OUT = "nearly a held-out dialogue"
_DIALOGUES_PER_PROCESS = 4_000  # below it, starting a process takes longer than it saves

Json = dict[str, Any]


@dataclass
class Counts:
    """The sums over some examples; `truncated` is the number that lost messages."""

    examples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    truncated: int = 0
    messages_dropped: int = 0

    def add(self, tokens: Tokens) -> None:
        """Counts one example in."""
        self.examples += 1
        self.tokens += len(tokens.token_ids)
        self.trained_tokens += num_trained(tokens.trained_mask)
        self.longest = max(self.longest, len(tokens.token_ids))
        self.truncated += tokens.num_messages_dropped > 0
        self.messages_dropped += tokens.num_messages_dropped


class Statistics:
    """Counts examples by split, by kind and by source, and drops by reason."""

    def __init__(self, account: Account) -> None:
        """Starts empty; `account` counts each example and each drop too."""
        self._account = account
        self._counts: dict[str, dict[str, dict[str, Counts]]] = {}
        self.drops: Counter[str] = Counter()
        self._drops_shown: dict[str, list[str]] = {}

    def add(self, tokens: Tokens, *, split: str, kind: str, source: str) -> None:
        """Counts one example in."""
        self._account.use(TRAINED_ON if split == "train" else HELD_OUT)
        groups = self._counts.setdefault(split, {"all": {}, "by_kind": {}, "by_source": {}})
        for group, name in (("all", "all"), ("by_kind", kind), ("by_source", source)):
            groups[group].setdefault(name, Counts()).add(tokens)

    def drop(self, dropped: Dropped, dialogue_id: str, place: str) -> None:
        """Counts one dropped dialogue; `place` is its file and line."""
        self._account.leave_out(dropped.reason, place, dropped.detail)
        self.drops[dropped.reason] += 1
        shown = self._drops_shown.setdefault(dropped.reason, [])
        if len(shown) < _SHOWN:
            shown.append(f"{dialogue_id}: {dropped.detail}")

    def to_json(self) -> Json:
        """Returns all counts."""
        return {
            "splits": {
                split: {
                    group: {name: asdict(counts) for name, counts in members.items()}
                    for group, members in groups.items()
                }
                for split, groups in self._counts.items()
            },
            "dropped": dict(self.drops),
            "dropped_examples": self._drops_shown,
        }


def duplicates_to_json(
    report: DuplicateReport,
    *,
    train: Sequence[Dialogue],
    held_out: Sequence[Dialogue],
    num_removed: int,
) -> Json:
    """Returns the counts of a report and the first few of each kind, by id and beginning."""
    closest = sorted(report.nearly_held_out, key=lambda pair: -pair.similarity)[:_SHOWN]
    return {
        "repeated_in_train": len(report.repeated_in_train),
        "repeated_in_held_out": len(report.repeated_in_held_out),
        "held_out_too": len(report.held_out_too),
        "nearly_held_out": len({pair.train for pair in report.nearly_held_out}),
        "removed_from_train": num_removed,
        "repeated_in_train_examples": [_shown(train[i]) for i in report.repeated_in_train[:_SHOWN]],
        "held_out_too_examples": [_shown(train[i]) for i in report.held_out_too[:_SHOWN]],
        "nearly_held_out_examples": [
            {
                "similarity": round(pair.similarity, 4),
                "train": _shown(train[pair.train]),
                "held_out": _shown(held_out[pair.held_out]),
            }
            for pair in closest
        ],
    }


def describe(statistics: Json) -> str:
    """Returns the statistics of a cache as lines for a terminal or a log."""
    lines = list(statistics["readings"])
    for split, groups in statistics["splits"].items():
        lines.append(f"{split}: {_counts_line(groups['all']['all'])}")
        lines += [f"  {kind}: {_counts_line(row)}" for kind, row in groups["by_kind"].items()]
    dropped = [f"{count} {reason}" for reason, count in statistics["dropped"].items()]
    lines.append(f"dropped: {', '.join(dropped) or 'none'}")
    found = statistics["duplicates"]
    lines.append(
        f"duplicates: {found['repeated_in_train']} repeated in the training data, "
        f"{found['held_out_too']} held out too, {found['nearly_held_out']} nearly held out; "
        f"{found['removed_from_train']} removed from the training data"
    )
    return "\n".join(lines)


def _counts_line(counts: Json) -> str:
    return (
        f"{counts['examples']:,} examples, {counts['tokens']:,} tokens "
        f"({counts['trained_tokens']:,} trained), longest {counts['longest']:,}, "
        f"{counts['truncated']:,} truncated"
    )


def _shown(dialogue: Dialogue) -> Json:
    spoken = [message.content for message in dialogue.messages if message.role != "system"]
    return {"id": dialogue.id, "text": "\n".join(spoken)[:_BEGINNING]}


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Settings of the preparation; all but `num_processes` decide what the cache holds.

    Attributes:
        held_out: which dialogues are held out.
        duplicates: settings for duplicate dialogues.
        max_refused_share: the share of dialogues that the template may refuse, 0 to 1, before it
            counts as an error of the settings and not of the data.
        num_processes: processes that tokenise; None uses the cores if there is enough data.
    """

    held_out: HeldOutConfig = HeldOutConfig()
    duplicates: DuplicatesConfig = DuplicatesConfig()
    max_refused_share: float = 0.01
    num_processes: int | None = None


class Prepared(NamedTuple):
    """A cache: its folder, its splits (`held_out` is None if it is empty), and its statistics."""

    folder: pathlib.Path
    train: TokenDataset
    held_out: TokenDataset | None
    statistics: dict[str, Any]


def prepare(
    sources: Sequence[DialogueSource],
    tokenizer: DialogueTokenizer,
    config: PrepareConfig,
    *,
    folder: str | os.PathLike[str],
    progress: Callable[[Progress], None] | None = None,
) -> Prepared:
    """Reads, splits, cleans and tokenises dialogues, or returns the existing cache.

    Args:
        sources: the files.
        tokenizer: a template with its tokenizer (`huatuo_jax.data.tokenizing.TemplateTokenizer`).
        config: settings.
        folder: of all caches; each is a folder named by a hash of the files' content, of the
            template and the tokenizer, and of the settings that affect the result.
        progress: called while dialogues are tokenised; not called if the cache exists.

    Raises:
        ValueError: two sources of one name, an unreadable source, too many dialogues that the
            template refuses, nothing held out in spite of `held_out.share`, or nothing left to
            train.
    """
    inputs = _inputs(sources, tokenizer, config)

    def build(unfinished: pathlib.Path) -> None:
        statistics = _build(sources, tokenizer, config, unfinished, progress)
        text = json.dumps({"inputs": inputs, **statistics}, ensure_ascii=False, indent=2)
        (unfinished / _STATISTICS_FILE).write_text(
            text, encoding="utf-8", errors="backslashreplace"
        )

    cache = build_once(folder, cache_key(inputs), build)
    return Prepared(
        folder=cache,
        train=TokenDataset(cache, "train"),
        held_out=TokenDataset(cache, "held_out") if has_split(cache, "held_out") else None,
        statistics=json.loads((cache / _STATISTICS_FILE).read_text(encoding="utf-8")),
    )


class _Item(NamedTuple):
    """A dialogue, its file, line and source, and its normalized text."""

    dialogue: Dialogue
    file: str
    line: int
    source: str
    split: Split
    text: str

    @property
    def place(self) -> str:
        """The file and line, as messages name them."""
        return f"{self.file}:{self.line}"


def _inputs(
    sources: Sequence[DialogueSource], tokenizer: DialogueTokenizer, config: PrepareConfig
) -> dict[str, Any]:
    repeated = [name for name, n in Counter(source.name for source in sources).items() if n > 1]
    if repeated:
        raise ValueError(f"sources: {repeated} name two sources each, every name should be its own")
    return {
        "sources": [source.identity for source in sources],
        "tokenizer": tokenizer.identity,
        "held_out": asdict(config.held_out),
        "duplicates": asdict(config.duplicates),
        "max_refused_share": config.max_refused_share,
    }


def _build(
    sources: Sequence[DialogueSource],
    tokenizer: DialogueTokenizer,
    config: PrepareConfig,
    folder: pathlib.Path,
    progress: Callable[[Progress], None] | None,
) -> dict[str, Any]:
    began = time.monotonic()
    account = Account("dialogues")
    items, readings = _read(sources, config.held_out, account)
    items, duplicates = _without_duplicates(items, config.duplicates, account)
    prepared = time.monotonic()
    statistics = Statistics(account)
    num_processes = config.num_processes or _num_processes(len(items))
    write_examples(
        folder,
        _entries(
            items,
            tokenizer,
            statistics,
            account,
            config.max_refused_share,
            num_processes,
            progress,
        ),
        sources=[source.name for source in sources],
        description="Dialogues as tokens, with the mask of the trained ones (huatuo_jax).",
    )
    seconds = {
        "reading_and_duplicates": round(prepared - began, 3),
        "tokenising_and_writing": round(time.monotonic() - prepared, 3),
    }
    return {
        "readings": readings,
        "account": account.to_json(),
        **statistics.to_json(),
        "duplicates": duplicates,
        "num_processes": num_processes,
        "seconds": seconds,
    }


def _read(
    sources: Sequence[DialogueSource], held_out: HeldOutConfig, account: Account
) -> tuple[list[_Item], list[str]]:
    """Reads all dialogues, and describes each file in a line."""
    items: list[_Item] = []
    readings = []
    for source in sources:
        for reading in source.readings():
            for dialogue in reading:
                text = dialogue_text(dialogue.messages)
                by_hash = source.held_out_by == "hash" and held_out.holds_out(text)
                is_held_out = by_hash or source.held_out_by == "always"
                split: Split = "held_out" if is_held_out else "train"
                items.append(_Item(dialogue, reading.file, reading.line, source.name, split, text))
            readings.append(reading.summary())
            account.add_rows(reading)
    if held_out.share and not any(item.split == "held_out" for item in items):
        raise ValueError(
            f"held_out.share: {held_out.share} of {len(items)} dialogues holds out none, it should "
            "be larger, or 0"
        )
    return items, readings


def _without_duplicates(
    items: list[_Item], config: DuplicatesConfig, account: Account
) -> tuple[list[_Item], dict[str, Any]]:
    """Returns the items to keep, and a report of the duplicates."""
    train = [item for item in items if item.split == "train"]
    held_out = [item for item in items if item.split == "held_out"]
    report = find_duplicates([i.text for i in train], [i.text for i in held_out], config)
    removed = report.removable if config.remove else set()
    found = duplicates_to_json(
        report,
        train=[item.dialogue for item in train],
        held_out=[item.dialogue for item in held_out],
        num_removed=len(removed),
    )
    in_held_out, repeated = set(report.held_out_too), set(report.repeated_in_train)
    for index in sorted(removed):
        reason = HELD_OUT_TOO if index in in_held_out else NEARLY_HELD_OUT
        account.leave_out(REPEATED if index in repeated else reason, train[index].place)
    kept = [item for index, item in enumerate(train) if index not in removed]
    return kept + held_out, found


def _entries(
    items: Sequence[_Item],
    tokenizer: DialogueTokenizer,
    statistics: Statistics,
    account: Account,
    max_refused_share: float,
    num_processes: int,
    progress: Callable[[Progress], None] | None,
) -> Iterator[list[Entry]]:
    """Yields the examples in chunks, and counts them."""
    chunks = tokenize_in_chunks(
        [item.dialogue.messages for item in items],
        tokenizer,
        num_processes=num_processes,
        progress=progress,
    )
    waiting = iter(items)
    num_done = 0
    for chunk in chunks:
        entries = []
        for result in chunk:
            item = next(waiting)
            if isinstance(result, Dropped):
                statistics.drop(result, item.dialogue.id, item.place)
                continue
            kind = item.dialogue.kind or UNKNOWN_KIND
            statistics.add(result, split=item.split, kind=kind, source=item.source)
            example = Example(result.token_ids, result.trained_mask, kind, item.dialogue.id)
            entries.append(Entry(item.split, item.source, example))
        num_done += len(chunk)
        if num_done >= _JUDGED_FROM or num_done == len(items):
            _check_refused(statistics, num_done, max_refused_share)
        yield entries
    if not account.used[TRAINED_ON]:
        raise ValueError("\n  ".join(["no dialogue is left to train on", *account.lines()]))


def _check_refused(statistics: Statistics, num_dialogues: int, max_share: float) -> None:
    refused = statistics.drops["cannot be rendered"]
    if refused > max_share * num_dialogues:
        shown = statistics.to_json()["dropped_examples"]["cannot be rendered"]
        raise ValueError(
            f"{refused} of {num_dialogues} dialogues cannot be rendered in this template, more "
            f"than max_refused_share={max_share:g} allows: {shown[0]}"
        )


def _num_processes(num_dialogues: int) -> int:
    return max(1, min(os.cpu_count() or 1, num_dialogues // _DIALOGUES_PER_PROCESS))
