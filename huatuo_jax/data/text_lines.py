"""Lines of a text file, every one decoded strictly; see `encodings` for what they are decoded by.

Lines end at a line feed, or at a carriage return in a file whose first line ends with one alone (as
old Macs wrote them), and nowhere else: U+2028, U+2029 and U+0085 may stand inside a JSON string.
"""

import pathlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from huatuo_jax.data.encodings import byte_order_mark, choose_encoding, undecodable

_BLOCK = 1 << 20


class Line(NamedTuple):
    """One decoded line; where bytes did not decode, `fault` says which and the row is an error."""

    number: int
    text: str
    fault: str | None


def read_lines(path: pathlib.Path, encoding: str | None = None) -> Iterator[Line]:
    """Yields the lines of a text file with their line ends, decoded strictly one by one.

    Args:
        path: the file.
        encoding: its encoding; None to tell it (`encodings.choose_encoding`).

    Raises:
        ValueError: the encoding cannot be told.
    """
    told = choose_encoding(path, encoding)
    mark = byte_order_mark(told)
    offset = 0
    with open(path, "rb") as file:
        for number, raw in enumerate(_raw_lines(file, told), start=1):
            size = len(raw)
            if number == 1:
                raw = raw.removeprefix(mark)
            fault = undecodable(raw, told, offset + size - len(raw))
            # A line with a fault is never used as text: the replacement keeps a CSV in step.
            yield Line(number, raw.decode(told, "replace" if fault else "strict"), fault)
            offset += size


def _raw_lines(file: BinaryIO, encoding: str) -> Iterator[bytes]:
    """The bytes of each line, its end included."""
    feed, carriage = "\n".encode(encoding), "\r".encode(encoding)
    start = file.read(_BLOCK)
    file.seek(0)
    first_feed, first_carriage = _find(start, feed, 0), _find(start, carriage, 0)
    behind = first_carriage  # Of all carriage returns there: some programs write two of them.
    while behind >= 0 and start.startswith(carriage, behind):
        behind += len(carriage)
    end = feed if first_carriage < 0 or 0 <= first_feed <= behind else carriage
    if end == b"\n":
        yield from file
        return
    held = b""
    while block := file.read(_BLOCK):
        held += block
        begin = 0
        while (found := _find(held, end, begin)) >= 0:
            yield held[begin : found + len(end)]
            begin = found + len(end)
        held = held[begin:]
    if held:
        yield held


def _find(whole: bytes, end: bytes, begin: int) -> int:
    """Where the line end stands, at a whole number of its own width (UTF-16 has two bytes)."""
    found = whole.find(end, begin)
    while found >= 0 and found % len(end) != begin % len(end):
        found = whole.find(end, found + 1)
    return found
