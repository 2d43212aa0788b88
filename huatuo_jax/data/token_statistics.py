"""What a token cache holds, in numbers: counted while it is built, kept beside it, and shown."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from huatuo_jax.data.accounting import HELD_OUT, TRAINED_ON, Account
from huatuo_jax.data.duplicates import DuplicateReport
from huatuo_jax.data.examples import Dropped, Tokens, num_trained
from huatuo_jax.data.records import Dialogue

_SHOWN = 10  # of each sort of trouble
_BEGINNING = 60  # characters of a text that is shown

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
        """Starts at nothing; `account` is told of each example and each drop."""
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
        """Counts one dialogue that became no example; `place` is its file and line."""
        self._account.leave_out(dropped.reason, place, dropped.detail)
        self.drops[dropped.reason] += 1
        shown = self._drops_shown.setdefault(dropped.reason, [])
        if len(shown) < _SHOWN:
            shown.append(f"{dialogue_id}: {dropped.detail}")

    def to_json(self) -> Json:
        """All counts."""
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
    """The counts of a report and the first few of each sort, by id and beginning."""
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
    """The statistics of a cache as lines for a terminal or a log."""
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
