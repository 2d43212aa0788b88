"""Pieces of a page: text made safe, numbers that can be read back, tables, figures."""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

ABSENT = "–"


def text(value: object) -> str:
    """Any text as HTML."""
    return html.escape(str(value))


def number(value: float | int | None, *, name: str | None = None, digits: int = 3) -> str:
    """A number as it is shown, with all of its digits in an attribute.

    Args:
        value: None or NaN shows as a dash.
        name: what programs find it by.
        digits: shown after the point.
    """
    if value is None or not math.isfinite(value):
        return ABSENT
    is_whole = isinstance(value, int) or (value.is_integer() and abs(value) >= 1000)
    shown = f"{value:,.0f}" if is_whole else f"{value:,.{digits}f}"
    shown = shown.replace("-", "\u2212")  # A minus that is as wide as a digit.
    found = "" if name is None else f' data-name="{text(name)}"'
    return f'<data value="{value!r}"{found}>{shown}</data>'


def interval(found: Mapping[str, Any] | None, *, name: str | None = None, digits: int = 3) -> str:
    """A figure with its 95 % interval."""
    if found is None:
        return ABSENT
    return f"{number(found['value'], name=name, digits=digits)} {bounds(found, digits=digits)}"


def bounds(found: Mapping[str, Any], *, digits: int = 3) -> str:
    """The 95 % interval of a figure."""
    low, high = number(found["low"], digits=digits), number(found["high"], digits=digits)
    return f'<span class="ci">[{low}, {high}]</span>'


def percent(value: float | None) -> str:
    """A share."""
    return ABSENT if value is None else f"{number(100 * value, digits=1)} %"


def seconds(value: float) -> str:
    """A duration."""
    if value < 60:
        return f"{number(value, digits=1)} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    caption: str = "",
    words: bool = False,
) -> str:
    """A table whose cells are HTML already; it scrolls by itself where the page is narrow.

    Args:
        head: titles of the columns.
        rows: each row's cells, its name first.
        caption: above the table.
        words: the cells are text, which is set from the left.
    """
    titles = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(
        f"<tr><th scope=row>{row[0]}</th>"
        + "".join(f"<td>{cell}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    kind = ' class="words"' if words else ""
    told = f"<caption>{caption}</caption>" if caption else ""
    return (
        f'<div class="scroll"><table{kind}>{told}<thead><tr>{titles}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def section(name: str, title: str, *parts: str) -> str:
    """A part of the page that the contents link to."""
    return f'<section id="{name}"><h2>{text(title)}</h2>{"".join(parts)}</section>'


def paragraph(*sentences: str) -> str:
    """Sentences that are HTML already."""
    return f"<p>{' '.join(sentences)}</p>"


def turns(messages: Iterable[tuple[str, str]]) -> str:
    """The turns of a prompt, each a role and a text; the system's is left out."""
    return "".join(
        f'<p class="turn"><b>{_SPEAKERS[role]}</b>{text(said)}</p>'
        for role, said in messages
        if role != "system"
    )


_SPEAKERS = {"user": "Patient", "assistant": "Doctor"}


def figures(*drawn: tuple[str, str]) -> str:
    """Plots side by side where there is room, each with its caption."""
    shown = "".join(
        f"<figure>{svg}<figcaption>{caption}</figcaption></figure>" for svg, caption in drawn
    )
    return f'<div class="figures">{shown}</div>'


def card(title: str, value: str, note: str) -> str:
    """A headline number."""
    return f'<div class="card"><h3>{title}</h3><p class="big">{value}</p><p>{note}</p></div>'


def details(summary: str, *parts: str) -> str:
    """What is folded away."""
    return f"<details><summary>{text(summary)}</summary>{''.join(parts)}</details>"
