"""The dialogue files of a run, under the names that the mixture knows them by."""

import hashlib
import json
import os
import pathlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from huatuo_jax.data.adapters import Adapter
from huatuo_jax.data.files import Row, read_rows
from huatuo_jax.data.readers import Keywords, Reading, read_dialogues
from huatuo_jax.data.records import Dialogue

HeldOutBy = Literal["hash", "never", "always"]

_BLOCK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class DialogueSource:
    """One or more files that are one source.

    Attributes:
        name: what the mixture and the reports call it.
        paths: files, folders or hub names, see `huatuo_jax.data.readers.read_dialogues`.
        reading: the reader's keywords, as `{"kind": "real_instruction"}`.
        held_out_by: which of its dialogues are held out: those of the common draw by hash, none, or
            all (a held-out file).
    """

    name: str
    paths: tuple[str, ...]
    reading: Keywords = field(default_factory=Keywords)
    held_out_by: HeldOutBy = "hash"

    def __post_init__(self) -> None:
        """Refuses a source without files."""
        if not self.paths:
            raise ValueError(f"sources.{self.name}.paths: no file, it should name at least one")

    def readings(self) -> Iterator[Reading[Dialogue]]:
        """One reading a path, not yet begun."""
        for path in self.paths:
            yield read_dialogues(path, **self.reading)

    @property
    def identity(self) -> dict[str, object]:
        """All that its dialogues depend on: the files' names and content, and how they are read."""
        reading = {
            name: value.name if isinstance(value, Adapter) else value
            for name, value in self.reading.items()
        }
        return {
            "name": self.name,
            "files": [[pathlib.Path(path).name, content_hash(path)] for path in self.paths],
            "reading": reading,
            "held_out_by": self.held_out_by,
        }


def source_names(paths: Sequence[str]) -> list[str]:
    """A name for the source of each file: its own, with as much before and behind it as tells it.

    `a/train.jsonl` and `b/train.jsonl` are `a/train` and `b/train`.
    """
    files = [pathlib.Path(path) for path in paths]
    names = [file.stem for file in files]
    parents = [f"{file.parent.name}/{file.stem}" for file in files]
    for finer in ([file.name for file in files], parents, [str(path) for path in paths]):
        counts = Counter(names)
        if max(counts.values(), default=1) == 1:
            break
        told = Counter(finer)
        names = [
            fine if counts[name] > 1 and told[fine] == 1 else name
            for name, fine in zip(names, finer, strict=True)
        ]
    return names


def content_hash(path: str | os.PathLike[str]) -> str:
    """A hash of a file's bytes, of all files of a folder, or of the rows of a hub data set."""
    whole = hashlib.sha256()
    place = pathlib.Path(path)
    if place.is_file():
        _update_with_file(whole, place)
    elif place.is_dir():
        for file in sorted(place.rglob("*")):
            if file.is_file():
                whole.update(str(file.relative_to(place)).encode() + b"\0")
                _update_with_file(whole, file)
    else:  # A name on the hub says nothing of the content, so the rows have to.
        for row in read_rows(path):
            value = row.value if isinstance(row, Row) else str(row)
            whole.update(json.dumps(value, sort_keys=True, default=str).encode())
    return whole.hexdigest()[:32]


def _update_with_file(whole: "hashlib._Hash", path: pathlib.Path) -> None:
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            whole.update(block)
