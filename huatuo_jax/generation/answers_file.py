"""The answers file: grows by whole chunks, and goes on where a killed run left it.

Beside `NAME.jsonl` stands `NAME.jsonl.settings.json`, which says what decides its content. The work
is cut into chunks by the input alone; what a killed run wrote of an unfinished chunk is cut off,
and the chunk is done again, so that the file is the same byte for byte.
"""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import IO, Any

from huatuo_jax import atomic


class AnswersFile:
    """An answers file opened for one run; a context manager.

    Attributes:
        num_records: records that whole chunks hold.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        ids: Sequence[str],
        chunk_size: int,
        settings: Mapping[str, Any],
    ) -> None:
        """Open the file, or make it, and cut off an unfinished chunk.

        Args:
            path: the file.
            ids: of all records it is to hold, in order.
            chunk_size: records of a chunk.
            settings: plain values that decide the content.

        Raises:
            ValueError: the file is there with other settings or other records, or another process
                writes it.
            OSError: it cannot be written.
        """
        self._path = pathlib.Path(path)
        self._ids, self._chunk_size = ids, chunk_size
        self._path.parent.mkdir(parents=True, exist_ok=True)
        settings = json.loads(json.dumps(dict(settings)))
        self._check_settings(settings)
        self._file: IO[bytes] = self._path.open("ab+")
        try:
            atomic.lock_file(self._file.fileno(), self._path)
            self.num_records, end = self._whole_chunks()
            self._write_settings(settings)
            if end != self._file.seek(0, os.SEEK_END):
                self._file.truncate(end)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "AnswersFile":
        """The file itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close it."""
        self._file.close()

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Add one chunk, and see it onto the disk."""
        expected = self._ids[self.num_records : self.num_records + self._chunk_size]
        assert [record["id"] for record in records] == list(expected)
        lines = [json.dumps(record, ensure_ascii=False, allow_nan=False) for record in records]
        self._file.write("".join(f"{line}\n" for line in lines).encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self.num_records += len(records)

    @property
    def _settings_path(self) -> pathlib.Path:
        return self._path.with_name(f"{self._path.name}.settings.json")

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        if not self._path.exists() or self._path.stat().st_size == 0:
            return
        if not self._settings_path.is_file():
            raise ValueError(
                f"{self._path} is there, and {self._settings_path.name}, which says how it was "
                "made, is not: choose another output"
            )
        found = json.loads(self._settings_path.read_text(encoding="utf-8"))
        names = sorted(settings.keys() | found.keys())
        other = [name for name in names if found.get(name) != settings.get(name)]
        if other:
            changes = ", ".join(
                f"{name} {found.get(name)!r}, now {settings.get(name)!r}" for name in other
            )
            raise ValueError(
                f"{self._path} was made with {changes}: choose another output, or remove it"
            )

    def _write_settings(self, settings: Mapping[str, Any]) -> None:
        # Renamed into place, and before the first answer: a file of answers never lacks it.
        atomic.write_file(self._settings_path, json.dumps(settings, indent=2, ensure_ascii=False))

    def _whole_chunks(self) -> tuple[int, int]:
        """How many records whole chunks hold, and where in the file they end."""
        self._file.seek(0)
        end, num_lines, offset = (0, 0), 0, 0
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            self._check_line(num_lines, line)
            num_lines, offset = num_lines + 1, offset + len(line)
            if num_lines % self._chunk_size == 0 or num_lines == len(self._ids):
                end = (num_lines, offset)
        return end

    def _check_line(self, index: int, line: bytes) -> None:
        try:
            found = json.loads(line)["id"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self._path} line {index + 1}: not an answers record") from error
        if index >= len(self._ids) or found != self._ids[index]:
            raise ValueError(
                f"{self._path} line {index + 1}: id {found!r} is not the one due there: choose "
                "another output"
            )
