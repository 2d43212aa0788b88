"""Markdown of untrusted text: escaped lines, numbers, tables and code blocks."""

import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

ABSENT = "–"
_PUNCTUATION = re.compile(r"([\\`*_\[\]|~])")
_LINE_START = re.compile(r"^([#>+=-])")
_LIST_NUMBER = re.compile(r"^(\d+)([.)])(?=\s|$)")
_BIDIRECTIONAL = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def plain(text: object) -> str:
    """Replaces invisible characters: controls, lone surrogates and bidirectional marks.

    Each becomes U+FFFD; of controls, line breaks (all as a line feed) and tabs stay.
    """
    lines = re.sub("\r\n?|\u0085|\u2028|\u2029", "\n", str(text))
    return "".join("\ufffd" if _is_hidden(one) else one for one in lines)


def inline(text: object) -> str:
    """Escapes a text for a line or a table's cell."""
    line = " ".join(plain(text).split())
    escaped = _PUNCTUATION.sub(r"\\\1", line).replace("&", "&amp;").replace("<", "&lt;")
    # What makes a heading, a quotation or a list, at the start of a line alone.
    return _LIST_NUMBER.sub(r"\1\\\2", _LINE_START.sub(r"\\\1", escaped))


def fenced(text: object, *, language: str = "text") -> str:
    """Returns a text as a code block whose fence is longer than any in the text."""
    body = plain(text)
    longest = max((len(run) for run in re.findall("`+", body)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{body}\n{fence}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table; its cells are Markdown without line breaks."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | None, *, digits: int = 3) -> str:
    """Formats a number; a dash for None and NaN."""
    if value is None or not math.isfinite(value):
        return ABSENT
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"


def interval(found: Mapping[str, Any] | None, *, digits: int = 3) -> str:
    """Formats a figure's `value` with its 95 % interval, `low` and `high`."""
    if found is None:
        return ABSENT
    value, low, high = (number(found[name], digits=digits) for name in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _is_hidden(character: str) -> bool:
    is_control = unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t"
    return is_control or character in _BIDIRECTIONAL
