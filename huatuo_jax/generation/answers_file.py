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
from typing import Any

from huatuo_jax import atomic
from huatuo_jax.json_lines import AppendedFile, Line


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
        settings = json.loads(json.dumps(dict(settings)))
        self._check_settings(settings)
        self._file = AppendedFile(self._path, locked=True)
        try:
            self.num_records, end = self._whole_chunks()
            self._write_settings(settings)
            self._file.cut(end)
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
        self._file.append(records)
        self._file.sync()
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
        whole = (0, 0)
        for num_records, line in enumerate(self._file.lines(), start=1):
            self._check_line(num_records - 1, line)
            if num_records % self._chunk_size == 0 or num_records == len(self._ids):
                whole = (num_records, line.end)
        return whole

    def _check_line(self, index: int, line: Line) -> None:
        if "id" not in line.row:
            raise ValueError(f"{self._path}:{line.number}: not an answers record, it has no id")
        if index >= len(self._ids) or line.row["id"] != self._ids[index]:
            raise ValueError(
                f"{self._path}:{line.number}: id {line.row['id']!r} is not the one due there: "
                "choose another output"
            )
