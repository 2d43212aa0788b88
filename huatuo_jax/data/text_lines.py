"""Lines of a text file: UTF-8 and GB18030 told apart, every line decoded strictly."""

import os
import pathlib
from collections.abc import Iterator
from typing import Literal, NamedTuple

Encoding = Literal["utf-8", "gb18030"]

_SAMPLE_BYTES = 4 << 20
# GB18030 text of this many bytes is practically never valid UTF-8 by chance.
_TELLING_BYTES = 24


class Line(NamedTuple):
    """One decoded line; where bytes did not decode, `fault` says which and the row is an error."""

    number: int
    text: str
    fault: str | None


def choose_encoding(path: str | os.PathLike[str]) -> Encoding:
    """Tells UTF-8 from GB18030 by decoding the first megabytes strictly, line by line.

    The encoding that most of the text decodes in is the file's; lines that then do not decode are
    bad rows of a good file.

    Raises:
        ValueError: most of the text is in neither, with the line and byte offset of the first
            fault.
    """
    sizes = {"utf-8": 0, "gb18030": 0, "neither": 0}
    first_fault, offset = "", 0
    with open(path, "rb") as file:
        for number, raw in enumerate(file.readlines(_SAMPLE_BYTES), start=1):
            if number == 1 and raw.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise ValueError(f"{path}:1: the file is UTF-16; save it as UTF-8")
            if not raw.isascii():
                fault = _undecodable(raw, "utf-8", offset)
                if fault and not _undecodable(raw, "gb18030", offset):
                    sizes["gb18030"] += len(raw)
                elif fault:
                    sizes["neither"] += len(raw)
                    first_fault = first_fault or f"{path}:{number}: {fault}, and not GB18030 either"
                else:
                    sizes["utf-8"] += len(raw)
            offset += len(raw)
    if sizes["neither"] > max(sizes["utf-8"], sizes["gb18030"]):
        raise ValueError(first_fault)
    return "gb18030" if sizes["gb18030"] > sizes["utf-8"] else "utf-8"


def read_lines(path: pathlib.Path) -> Iterator[Line]:
    """Yields the lines of a text file with their line ends, decoded strictly one by one."""
    encoding = choose_encoding(path)
    offset = 0
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            size = len(raw)
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            fault = _undecodable(raw, encoding, offset + size - len(raw))
            # A line with a fault is never used as text: the replacement keeps a CSV in step.
            yield Line(number, raw.decode(encoding, "replace" if fault else "strict"), fault)
            offset += size


def _undecodable(raw: bytes, encoding: Encoding, offset: int) -> str | None:
    """Says which byte of the file does not decode, or None."""
    try:
        raw.decode(encoding)
    except UnicodeDecodeError as error:
        byte, place = raw[error.start], offset + error.start
        return f"not {encoding.upper()}: byte 0x{byte:02x} at offset {place} of the file"
    if encoding == "gb18030" and not raw.isascii() and _is_utf8_by_intent(raw):
        return "UTF-8 text in a file that is otherwise GB18030"
    return None


def _is_utf8_by_intent(raw: bytes) -> bool:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return sum(byte > 0x7F for byte in raw) >= _TELLING_BYTES
