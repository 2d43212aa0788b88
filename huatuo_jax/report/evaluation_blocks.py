"""Pieces of an evaluation's page: tables with intervals, radar plots, lines of text.

Radar plots are drawn by the page's template, not by matplotlib: their labels are the data sets' own
words, in any script, which matplotlib would measure in a font that lacks them and would read `$` in
as mathematics.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

COLOURS = ("#0b6e69", "#c77700", "#3a6ea5", "#8e3b73", "#5b6675", "#6b8e23")
ABSENT = "–"
RADIUS = 100.0

_RINGS = (0.25, 0.5, 0.75, 1.0)
_BOUNDS = ("low", "value", "high")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A table's cell: a text or a number with its interval."""

    text: str
    interval: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table: the first cell of a row is its name; folded, only its caption is seen at first."""

    head: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]
    caption: str = ""
    folded: bool = False
    kind: str = "table"


@dataclass(frozen=True, kw_only=True)
class Polygon:
    """One model's values in a radar plot."""

    name: str
    colour: str
    points: str


@dataclass(frozen=True, kw_only=True)
class Label:
    """The name of an axis, and where it stands."""

    text: str
    x: float
    y: float
    anchor: str


@dataclass(frozen=True, kw_only=True)
class Radar:
    """A radar plot of shares from 0 to 1, an axis for each group."""

    caption: str
    labels: Sequence[Label]
    rings: Sequence[tuple[str, float]]
    axes: Sequence[tuple[float, float]]
    polygons: Sequence[Polygon]
    kind: str = "radar"


@dataclass(frozen=True, kw_only=True)
class Note:
    """A line of text."""

    text: str
    warning: bool = False
    kind: str = "note"


Block = Table | Radar | Note


def number(value: float | int | None, *, digits: int = 3) -> str:
    """A number as it is shown; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return ABSENT
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.{digits}f}".replace("-", "\u2212")


def figure(found: Mapping[str, Any] | None, *, digits: int = 3, scale: float = 1.0) -> Cell:
    """A value with its interval."""
    if found is None or found["value"] is None:
        return Cell(text=ABSENT)
    low, value, high = (number(found[name] * scale, digits=digits) for name in _BOUNDS)
    return Cell(text=value, interval=f"[{low}, {high}]")


def percent(found: Mapping[str, Any] | None) -> Cell:
    """A share with its interval, in percent."""
    return figure(found, digits=1, scale=100.0)


def plain(value: float | int | None, *, digits: int = 3) -> Cell:
    """A number without an interval."""
    return Cell(text=number(value, digits=digits))


def radar(
    shares: Mapping[str, Sequence[float | None]], names: Sequence[str], *, caption: str
) -> Radar:
    """A radar plot; a group without a value is drawn at the centre, and the caption says so."""
    count = len(names)
    turns = [2 * math.pi * place / count for place in range(count)]
    axes = [(math.sin(turn), -math.cos(turn)) for turn in turns]
    labels = [
        Label(
            text=name if len(name) <= 12 else f"{name[:11]}…",
            x=round(x * (RADIUS + 10), 1),
            y=round(y * (RADIUS + 12) + 4, 1),
            anchor="middle" if abs(x) < 0.2 else ("start" if x > 0 else "end"),
        )
        for name, (x, y) in zip(names, axes, strict=True)
    ]
    polygons = [
        Polygon(
            name=model,
            colour=COLOURS[number % len(COLOURS)],
            points=" ".join(
                f"{x * RADIUS * (value or 0.0):.1f},{y * RADIUS * (value or 0.0):.1f}"
                for value, (x, y) in zip(values, axes, strict=True)
            ),
        )
        for number, (model, values) in enumerate(shares.items())
    ]
    lacking = [
        name
        for place, name in enumerate(names)
        if all(values[place] is None for values in shares.values())
    ]
    if lacking:
        caption += f"; no verdict on {', '.join(lacking)}"
    return Radar(
        caption=caption,
        labels=labels,
        rings=[(f"{100 * ring:.0f}", ring * RADIUS) for ring in _RINGS],
        axes=[(round(x * RADIUS, 1), round(y * RADIUS, 1)) for x, y in axes],
        polygons=polygons,
    )
