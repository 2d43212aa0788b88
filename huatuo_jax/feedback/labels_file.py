"""The labels file: grows by whole judgements, and goes on where a killed run left it."""

import os
import pathlib
import time
from collections.abc import Sequence
from types import TracebackType

from huatuo_jax.feedback.judgements import Judgement, read_judgements
from huatuo_jax.json_lines import AppendedFile

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
        self._file: AppendedFile | None = None
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
            self._file.close()
            self._file = None

    def append(self, judgements: Sequence[Judgement]) -> None:
        """Add judgements, all of them or (killed) the first few."""
        if self._file is None:
            self._open()
        assert self._file is not None
        self._file.append(judgement.to_json() for judgement in judgements)
        if time.monotonic() - self._synced_s >= _TO_DISK_EVERY_S:
            self._file.sync()
            self._synced_s = time.monotonic()

    def _open(self) -> None:
        self._file = AppendedFile(self._path, locked=True)
        try:
            self.found = list(read_judgements(self._path))
            self._file.cut_unfinished()
        except BaseException:
            self._file.close()
            self._file = None
            raise
