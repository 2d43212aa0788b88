"""The table of departments, roles and use cases that instructions are drawn from, in balance."""

import json
import os
import pathlib
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huatuo_jax.core.files import as_path

Language = str
LANGUAGES: tuple[Language, ...] = ("zh", "en")
SHIPPED_TABLE = pathlib.Path(__file__).with_name("table.json")
SHIPPED_SEEDS = pathlib.Path(__file__).with_name("seeds.jsonl")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A value of the table in both languages; `needs_input` for a task on given material."""

    zh: str
    en: str
    needs_input: bool = False

    def named(self, language: Language) -> str:
        """Returns its name in a language."""
        return self.zh if language == "zh" else self.en


@dataclass(frozen=True, kw_only=True)
class Table:
    """The values that are sampled.

    Attributes:
        departments: of a hospital.
        roles: of whoever asks.
        use_cases: what the instruction is for.
    """

    departments: Sequence[Entry]
    roles: Sequence[Entry]
    use_cases: Sequence[Entry]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The subject of one instruction that is wanted."""

    department: Entry
    role: Entry
    use_case: Entry
    language: Language

    def labels(self) -> dict[str, str]:
        """The labels of a row, in Chinese whatever the language, so that counts add up."""
        return {
            "department": self.department.zh,
            "role": self.role.zh,
            "use_case": self.use_case.zh,
            "language": self.language,
        }


def read_table(path: str | os.PathLike[str] | None = None) -> Table:
    """Reads a table.

    Args:
        path: JSON with departments, roles and use_cases, each a list of {"zh", "en", "input"?};
            None for the shipped one.

    Raises:
        ValueError: no such file, or another layout.
    """
    path = as_path(SHIPPED_TABLE if path is None else path)
    if not path.is_file():
        raise ValueError(f"table: there is no file {path}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Table(
            departments=_entries(found["departments"]),
            roles=_entries(found["roles"]),
            use_cases=_entries(found["use_cases"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"table: {path} should be JSON with departments, roles and use_cases, each a list of"
            f' {{"zh": TEXT, "en": TEXT}}: {error!r}'
        ) from error


def _entries(values: Sequence[Mapping[str, Any]]) -> tuple[Entry, ...]:
    found = tuple(
        Entry(zh=str(one["zh"]), en=str(one["en"]), needs_input=bool(one.get("input", False)))
        for one in values
    )
    if not found:
        raise ValueError("a list is empty")
    if len({one.zh for one in found}) < len(found):
        raise ValueError("a name is there twice")
    return found


def draw_settings(
    table: Table,
    languages: Sequence[Language],
    count: int,
    *,
    in_a_row: int = 1,
    kept: Iterable[Mapping[str, str]],
    draw: random.Random,
) -> list[Setting]:
    """Draws settings that bring the kept rows into balance.

    Each value is one of those that the kept rows and the settings before have least of; which, is
    drawn. So every department, role, use case and language comes equally often, also where the
    rows of some are rejected more often than those of others.

    Args:
        table: the values.
        languages: of the instructions.
        count: how many settings.
        in_a_row: settings that share a language, as those of one request do.
        kept: labels of the rows so far.
        draw: of the choice among equals.
    """
    counts = {name: Counter[str]() for name in ("department", "role", "use_case", "language")}
    for labels in kept:
        for name, counter in counts.items():
            if name in labels:
                counter[labels[name]] += 1
    found = []
    for place in range(count):
        if place % in_a_row == 0:
            language = _scarcest_name(languages, counts["language"], draw)
        one = Setting(
            department=_scarcest(table.departments, counts["department"], draw),
            role=_scarcest(table.roles, counts["role"], draw),
            use_case=_scarcest(table.use_cases, counts["use_case"], draw),
            language=language,
        )
        for name, value in one.labels().items():
            counts[name][value] += 1
        found.append(one)
    return found


def _scarcest(entries: Sequence[Entry], counts: Counter[str], draw: random.Random) -> Entry:
    name = _scarcest_name([one.zh for one in entries], counts, draw)
    return next(one for one in entries if one.zh == name)


def _scarcest_name(names: Sequence[str], counts: Counter[str], draw: random.Random) -> str:
    least = min(counts[name] for name in names)
    return draw.choice([name for name in names if counts[name] == least])
