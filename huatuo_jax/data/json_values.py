"""Values that JSON can write, out of whatever a file's cells held.

Records carry their source's other columns along to every file that a stage writes, so a value that
JSON or UTF-8 cannot write is converted (or its row refused) here, when it is read:

- half a surrogate in a text or a key becomes U+FFFD, the replacement character;
- NaN (and pandas' NaT), which tables write for an absent number, becomes null;
- dates, times and timestamps become their ISO 8601 text, durations a number of seconds;
- a Decimal becomes a number where a float holds it exactly, else its digits as text;
- bytes become the text that they are in UTF-8; other bytes refuse the row;
- numpy scalars, arrays, tuples and sets become numbers and lists; UUIDs and paths their text;
- infinite numbers, other types, and what is nested deeper than `MAX_DEPTH` refuse the row.
"""

import datetime
import decimal
import math
import numbers
import os
import uuid
from collections.abc import Mapping, Set
from typing import Any, NamedTuple

import numpy as np

from huatuo_jax.data.records import shown

MAX_DEPTH = 100
HALF_CHARACTER = "half a character replaced by U+FFFD"
NOT_A_NUMBER = "NaN read as null"
TIME_TEXT = "time written as ISO 8601 text"
DURATION = "duration written as seconds"
DECIMAL = "Decimal written as a number, or as text where a float is not exact"
BYTES = "bytes read as UTF-8 text"
AS_TEXT = "identifier or path written as text"


class NotJson(ValueError):
    """A value that no JSON can stand for; the text says which and where."""


class Converted(NamedTuple):
    """A value of JSON's own types, and what was converted on the way, by column and rule."""

    value: Any
    notes: tuple[str, ...]


def json_value(value: object) -> Converted:
    """The value in JSON's own types; the notes of an object's fields begin with the field's name.

    Raises:
        NotJson: something in it cannot be converted.
    """
    notes: dict[str, None] = {}
    try:
        if not isinstance(value, Mapping):
            return Converted(_Walk("", notes).convert(value, 0), tuple(notes))
        whole: dict[str, Any] = {}
        for key, field in value.items():
            name = _Walk("a field's name", notes).key(key)
            if name in whole:
                raise NotJson(f"two fields are named {shown(name)} as text")
            whole[name] = _Walk(shown(name), notes).convert(field, 1)
    except RecursionError:
        raise NotJson(f"nested deeper than {MAX_DEPTH} levels") from None
    return Converted(whole, tuple(notes))


class _Walk:
    """The conversion of one column's value; what was converted goes into the notes."""

    def __init__(self, column: str, notes: dict[str, None]) -> None:
        self._column = column
        self._notes = notes

    def convert(self, value: Any, depth: int) -> Any:
        if isinstance(value, str):
            return self._text(value)
        if value is None or isinstance(value, bool | int) and type(value) in (bool, int):
            return value
        if depth > MAX_DEPTH:
            raise NotJson(self._at(f"nested deeper than {MAX_DEPTH} levels"))
        if isinstance(value, Mapping):
            return self._object(value, depth)
        if isinstance(value, list | tuple):
            return [self.convert(item, depth + 1) for item in value]
        if isinstance(value, Set):
            return [self.convert(item, depth + 1) for item in sorted(value, key=repr)]
        if isinstance(value, np.ndarray):
            return self.convert(value.tolist(), depth + 1)
        return self._scalar(value, depth)

    def key(self, key: object) -> str:
        if isinstance(key, str | bytes | bool | int | float | None | datetime.date | uuid.UUID):
            converted = self.convert(key, 0)
            return converted if isinstance(converted, str) else str(key)
        raise NotJson(self._at(f"a field's name is {type(key).__name__}, not text"))

    def _object(self, value: Mapping[Any, Any], depth: int) -> dict[str, Any]:
        whole: dict[str, Any] = {}
        for key, field in value.items():
            name = self.key(key)
            if name in whole:
                raise NotJson(self._at(f"two fields are named {shown(name)} as text"))
            whole[name] = self.convert(field, depth + 1)
        return whole

    def _scalar(self, value: Any, depth: int) -> Any:
        if isinstance(value, datetime.timedelta | np.timedelta64):
            return self._duration(value)
        if isinstance(value, np.datetime64):
            return self._noted(TIME_TEXT, str(value)) if value == value else self._absent()
        if isinstance(value, np.generic):
            return self.convert(value.item(), depth + 1)
        if isinstance(value, decimal.Decimal):
            return self._decimal(value)
        if isinstance(value, datetime.date | datetime.time):
            # NaT of pandas is a datetime that differs from itself.
            return self._noted(TIME_TEXT, value.isoformat()) if value == value else self._absent()
        if isinstance(value, bytes | bytearray | memoryview):
            return self._bytes(bytes(value))
        if isinstance(value, uuid.UUID | os.PathLike):
            return self._noted(AS_TEXT, self._text(str(value)))
        if isinstance(value, numbers.Integral):
            return int(value)
        if isinstance(value, numbers.Real):
            return self._float(float(value))
        raise NotJson(self._at(f"holds a {type(value).__name__}, which JSON cannot write"))

    def _text(self, value: str) -> str:
        try:
            value.encode()
        except UnicodeEncodeError:
            whole = value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
            return self._noted(HALF_CHARACTER, whole)
        return str(value)

    def _float(self, value: float) -> float | None:
        if math.isnan(value):
            return self._absent()
        if math.isinf(value):
            raise NotJson(self._at("holds an infinite number, which JSON cannot write"))
        return value

    def _duration(self, value: Any) -> float | None:
        if not value == value:  # NaT
            return self._absent()
        if isinstance(value, np.timedelta64):
            value = value.astype("timedelta64[us]").item()
        return self._noted(DURATION, value.total_seconds())

    def _decimal(self, value: decimal.Decimal) -> int | float | str | None:
        if value.is_nan():
            return self._absent()
        if value.is_infinite():
            return self._float(float(value))
        number = float(value)
        exact = math.isfinite(number) and decimal.Decimal(repr(number)) == value
        return self._noted(DECIMAL, number if exact else str(value))

    def _bytes(self, value: bytes) -> str:
        try:
            return self._noted(BYTES, value.decode())
        except UnicodeDecodeError:
            raise NotJson(self._at("holds bytes that are not UTF-8 text")) from None

    def _absent(self) -> Any:
        return self._noted(NOT_A_NUMBER, None)

    def _noted(self, rule: str, value: Any) -> Any:
        self._notes[self._at(rule)] = None
        return value

    def _at(self, what: str) -> str:
        return f"{self._column}: {what}" if self._column else what
