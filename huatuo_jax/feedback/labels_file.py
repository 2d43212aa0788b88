"""The labels file: grows by whole judgements, and goes on where a killed run left it."""

import json
import os
import pathlib
import time
from collections.abc import Sequence
from types import TracebackType

from huatuo_jax import atomic
from huatuo_jax.feedback.judgements import Judgement, read_judgements

_TO_DISK_EVERY_S = 1.0


class LabelsFile:
    """A labels file opened for one run; a context manager.

    It is made with its first judgement, so that a run that cannot start leaves nothing behind. A
    kill of the process loses no judgement that was appended; a crash of the machine may lose those
    of the last second, which are then asked for again.

    Attributes:
        found: the judgements that were there, failed and superseded ones too.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open the file, if there is one yet, and cut off a last line that is not whole.

        Args:
            path: the file.

        Raises:
            ValueError: it holds something else, or another process writes it.
            OSError: it cannot be read or written.
        """
        self._path = pathlib.Path(path)
        self._file: int | None = None
        self._synced_s = time.monotonic()
        self.found: list[Judgement] = []
        if self._path.exists():
            self._open()

    def __enter__(self) -> "LabelsFile":
        """The file itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """See it onto the disk, and close it."""
        if self._file is not None:
            os.fsync(self._file)
            os.close(self._file)
            self._file = None

    def append(self, judgements: Sequence[Judgement]) -> None:
        """Add judgements, all of them or (killed) the first few."""
        if self._file is None:
            self._open()
        assert self._file is not None
        lines = [
            json.dumps(judgement.to_json(), ensure_ascii=False, allow_nan=False)
            for judgement in judgements
        ]
        # Half a character, which UTF-8 lacks, becomes JSON's escape of it.
        data = "".join(f"{line}\n" for line in lines).encode("utf-8", "backslashreplace")
        while data:  # One write as a rule: what a kill can leave is a line or nothing.
            data = data[os.write(self._file, data) :]
        if time.monotonic() - self._synced_s >= _TO_DISK_EVERY_S:
            os.fsync(self._file)
            self._synced_s = time.monotonic()

    def _open(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            atomic.lock_file(self._file, self._path)
            self.found = list(read_judgements(self._path))
            self._cut_torn_line()
        except BaseException:
            os.close(self._file)
            self._file = None
            raise

    def _cut_torn_line(self) -> None:
        whole = self._path.read_bytes()
        end = whole.rfind(b"\n") + 1
        if end != len(whole):
            os.truncate(self._path, end)
