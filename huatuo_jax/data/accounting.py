"""Accounts of a stage's data: rows read, records used, and those left out, by reason.

Rows of files become records (dialogues, prompts, preference pairs), mostly one a row. Both sums
add up:

    rows    = rows used + rows left out, by reason
    records = records used, by purpose + records set aside, by setting + records left out, by reason
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from huatuo_jax.data.readers import Reading
from huatuo_jax.data.records import Comparison, Dialogue, Prompt

BAD_ROW = "bad row"
TOO_LONG = "too long"
NOT_RENDERED = "cannot be rendered"
TRAINED_ON = "to train on"
HELD_OUT = "held out"

READ_FROM = "read_from"
"""The extra field of a record that names the file and line it was made from."""

_SHOWN = 5  # places of each reason
_WARNED_ABOVE = 0.1  # of the data, left out
_UNFIT = (TOO_LONG, NOT_RENDERED)
_COUNTERS = ("rows_left_out", "used", "set_aside", "left_out", "mended")

RecordT = TypeVar("RecordT", Prompt, Comparison, Dialogue)


@dataclass
class Account:
    """Counts of rows and records.

    Attributes:
        unit: name of the records, in the plural.
        rows: rows read. `rows_used`: those that gave records. `rows_left_out`: the others.
        records: records made of them. `used`: by purpose. `left_out`: by reason.
        set_aside: left out by a setting, such as a limit; by that setting.
        mended: rows used after a repair, by the kind of repair.
        places: the first few of each reason, as `file:line: detail`.
    """

    unit: str
    rows: int = 0
    rows_used: int = 0
    rows_left_out: Counter[str] = field(default_factory=Counter)
    records: int = 0
    used: Counter[str] = field(default_factory=Counter)
    set_aside: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    mended: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)

    def add_rows(self, reading: Reading[Any]) -> None:
        """Counts the rows of a file that was read to its end."""
        self.rows += reading.rows
        self.rows_used += reading.rows_used
        self.rows_left_out.update(reading.exclusions)
        self.mended.update(reading.repairs)
        for error in reading.errors:
            self.rows_left_out[BAD_ROW] += 1
            self._show(BAD_ROW, str(error))

    def use(self, purpose: str, number: int = 1) -> None:
        """Counts records that are used."""
        self.records += number
        self.used[purpose] += number

    def leave_out(self, reason: str, place: str, detail: str = "") -> None:
        """Counts an unusable record, with `file:line` of its row."""
        self.records += 1
        self.left_out[reason] += 1
        self._show(reason, f"{place}: {detail}" if detail else place)

    def put_aside(self, setting: str, number: int = 1, *, used_for: str | None = None) -> None:
        """Counts records that a setting leaves out; `used_for` subtracts them from those used."""
        self.set_aside[setting] += number
        if used_for is None:
            self.records += number
        else:
            self.used[used_for] -= number

    def check(self, max_share: float, *, name: str, limit: str) -> None:
        """Raises ValueError if more than a share of the records do not fit, or all.

        A single one never stops a run, unless the share is 0: with few records it means nothing.
        Only `TOO_LONG` and `NOT_RENDERED` count; the other reasons are faults of the data.

        Args:
            max_share: 0 to 1.
            name: of the field or flag that sets it.
            limit: the limit on the length, as `max_length=512`.
        """
        self._check_sums()
        reasons = Counter({one: self.left_out[one] for one in _UNFIT if self.left_out[one]})
        number, usable = reasons.total(), self.used.total()
        allowed = max(max_share * self.records, 1.0 if max_share else 0.0)
        if usable and number <= allowed:
            return
        shown = [place for reason in reasons for place in self.places[reason]][:_SHOWN]
        more = [f"and {number - len(shown)} more"] if number > len(shown) else []
        allows = f", more than {name}={max_share:g} allows" if number > allowed else ""
        which = f"{number} of {self.records} {self.unit} cannot"
        if not usable:
            which = f"none of the {self.records} {self.unit} can"
        raise ValueError(
            "\n  ".join(
                [
                    f"{which} be used with {limit}{allows} ({_listed(reasons) or 'there is none'})",
                    *shown,
                    *more,
                ]
            )
        )

    def lines(self) -> list[str]:
        """Returns the report: the sums, a line for each reason, a warning if much is left out."""
        self._check_sums()
        parts = [f"{number:,} {purpose}" for purpose, number in (+self.used).items()]
        parts += [f"{number:,} {setting}" for setting, number in (+self.set_aside).items()]
        left_out = self.rows_left_out + self.left_out
        rows = f"{self.rows:,} rows read, " if self.rows else ""
        aside = f"; {self.rows_left_out.total():,} rows" if self.rows_left_out else ""
        lines = [
            f"{rows}{self.records:,} {self.unit}: {', '.join(parts) or 'none used'}; left out: "
            f"{self.left_out.total():,} {self.unit}{aside}"
        ]
        for reason, number in left_out.items():
            places = self.places[reason] if reason in self.places else []
            such_as = f", such as {places[0]}" if places else ""
            lines.append(f"left out, {reason}: {number:,}{such_as}")
        lines += [f"{what}: {number:,} rows" for what, number in self.mended.items()]
        of_all = self.records + self.rows_left_out.total()
        if left_out.total() > max(_WARNED_ABOVE * of_all, 1):
            share = left_out.total() / of_all
            lines.append(
                f"warning: {share:.0%} of the data is left out ({_listed(left_out)}): is this "
                "what you want?"
            )
        return lines

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as plain JSON values."""
        self._check_sums()
        return {
            "unit": self.unit,
            "rows": self.rows,
            "rows_used": self.rows_used,
            "records": self.records,
            **{name: dict(+getattr(self, name)) for name in _COUNTERS},
            "places": self.places,
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Account":
        """Returns the account that `to_json` wrote."""
        return cls(
            fields["unit"],
            rows=fields["rows"],
            rows_used=fields["rows_used"],
            records=fields["records"],
            places=dict(fields["places"]),
            **{name: Counter(fields[name]) for name in _COUNTERS},
        )

    def _show(self, reason: str, place: str) -> None:
        shown = self.places.setdefault(reason, [])
        if len(shown) < _SHOWN:
            shown.append(place)

    def _check_sums(self) -> None:
        assert self.rows == self.rows_used + self.rows_left_out.total(), self
        accounted = self.used.total() + self.set_aside.total() + self.left_out.total()
        assert self.records == accounted, self


def placed(reading: Reading[RecordT]) -> Iterator[tuple[str, RecordT]]:
    """Yields the records of a file, each with its place.

    The place is its file and line, or those it was made from (`READ_FROM`).
    """
    for record in reading:
        origin = record.extra[READ_FROM] if READ_FROM in record.extra else None
        yield origin if isinstance(origin, str) else f"{reading.file}:{reading.line}", record


def check_share(share: float, *, name: str) -> None:
    """Raises ValueError for a share outside 0 to 1."""
    if not 0 <= share <= 1 or math.isnan(share):
        raise ValueError(f"{name}={share!r} must lie between 0 and 1")


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{reason} {number:,}" for reason, number in counts.items())
