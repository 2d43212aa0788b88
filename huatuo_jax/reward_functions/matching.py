"""Compares an answer with a reference by rule: the same text, or the same numbers and units."""

import math
import re
import unicodedata
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

Match = Literal["auto", "exact", "numeric"]

_MARKS = " \t\r\n.,;:!?。，；：！？、\"'`*_()[]{}"
_MINUS = str.maketrans({"−": "-", "–": "-", "—": "-"})
_NUMBER = re.compile(
    r"(?<![\d.])(?P<sign>(?<![\d.)])[-+])?"
    r"(?P<digits>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
    r"(?P<power>e[-+]?\d+)?",
    re.IGNORECASE,
)
_UNIT = re.compile(r"\s?(%|°\s?[cf]|[^\W\d_]+(?:/[^\W\d_]+)*)", re.IGNORECASE)
_BETWEEN = re.compile(r"\s*[/,:~-]?\s*(?:to\s*|至\s*)?")


class Quantity(NamedTuple):
    """A number with what stands behind it.

    Attributes:
        value: of the number.
        unit: in lower case without spaces; empty where there is none.
    """

    value: float
    unit: str


def plain(text: str) -> str:
    """Returns a text in NFKC and lower case, single spaces within and no marks around it."""
    text = unicodedata.normalize("NFKC", text).translate(_MINUS).casefold()
    return " ".join(text.split()).strip(_MARKS)


def quantities(text: str) -> list[Quantity]:
    """Returns the numbers of a text with their units, in their order.

    Thousands may be set off by commas. A minus is a sign where no digit stands before it.
    """
    text = unicodedata.normalize("NFKC", text).translate(_MINUS)
    found = []
    for match in _NUMBER.finditer(text):
        digits = (match["sign"] or "") + match["digits"].replace(",", "") + (match["power"] or "")
        unit = _UNIT.match(text, match.end())
        name = "".join(unit[1].split()).casefold() if unit else ""
        found.append(Quantity(float(digits), name))
    return found


def is_quantity(reference: str) -> bool:
    """Tells whether a reference is numbers and units alone, as 12.5 mg or 140/90 mmHg."""
    text = unicodedata.normalize("NFKC", reference).translate(_MINUS).strip(_MARKS)
    place = 0
    for match in _NUMBER.finditer(text):
        if place and not _BETWEEN.fullmatch(text, place, match.start()):
            return False
        if not place and match.start():
            return False
        unit = _UNIT.match(text, match.end())
        place = unit.end() if unit else match.end()
    return place == len(text) and place > 0


def is_correct(
    answer: str,
    references: Sequence[str],
    *,
    match: Match = "auto",
    tolerance: float = 1e-6,
) -> bool:
    """Tells whether an answer is one of the references.

    Args:
        answer: the final answer, without any thinking.
        references: any of them is right; none may be empty.
        match: `exact` compares the whole texts by `plain`; `numeric` the last numbers of the
            answer, as many as the reference has, with their units where both have one; `auto` is
            `numeric` for a reference of numbers alone and `exact` for all others.
        tolerance: relative; for `numeric`.

    Raises:
        ValueError: an unknown rule, a reference without text, or one without a number for
            `numeric`.
    """
    if match not in get_args(Match):
        raise ValueError(f"match={match!r} must be one of {list(get_args(Match))}")
    if not (0 <= tolerance < 1):
        raise ValueError(f"tolerance={tolerance!r} must be 0 or more and below 1")
    return any(_is(answer, one, match=match, tolerance=tolerance) for one in references)


def _is(answer: str, reference: str, *, match: Match, tolerance: float) -> bool:
    wanted_text = plain(reference)
    if not wanted_text:
        raise ValueError(f"reference {reference!r} must hold a text to compare with")
    if match == "exact" or (match == "auto" and not is_quantity(reference)):
        return plain(answer) == wanted_text
    wanted = quantities(reference)
    if not wanted:
        raise ValueError(f"reference {reference!r} holds no number, which match='numeric' needs")
    found = quantities(answer)[-len(wanted) :]
    return len(found) == len(wanted) and all(
        math.isclose(one.value, other.value, rel_tol=tolerance, abs_tol=0)
        and (not one.unit or not other.unit or one.unit == other.unit)
        for one, other in zip(found, wanted, strict=True)
    )
