"""The tokenised dialogues on disk: ArrayRecord files with a TFDS description, read at random.

A cache is a folder that `tfds.builder_from_directory` opens like any dataset of TFDS, without
TensorFlow. Beside it stands `index.npz`, what planning needs of every example without reading it.

It is written by `tfds.core.SequentialWriter`: a `GeneratorBasedBuilder` holds back all examples to
shuffle them, and beyond 1 GB of them it calls TensorFlow.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from huatuo_jax import atomic
from huatuo_jax.data.examples import ALL_KINDS, Example, num_trained
from huatuo_jax.data.shuffling import Indices

Split = Literal["train", "held_out"]

_DATASET_NAME = "dialogues"
_FORMAT = "1.1.0"  # A cache of another format has another key.
_EXAMPLES_PER_FILE = 50_000
_INDEX_FILE = "index.npz"


class Entry(NamedTuple):
    """One example on its way into the cache."""

    split: Split
    source: str
    example: Example


def cache_key(inputs: Mapping[str, Any]) -> str:
    """The name of the cache of these inputs; they have to be what JSON can say."""
    text = json.dumps({"format": _FORMAT, **inputs}, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:24]


def build_once(
    folder: str | os.PathLike[str], key: str, build: Callable[[pathlib.Path], None]
) -> pathlib.Path:
    """Returns `FOLDER/KEY`, and has it built if it is not there.

    It is built beside its place and renamed when complete, so a build that was killed is never
    used (see `atomic`). Of several processes one builds and
    the others wait for it.

    Args:
        folder: where all caches are, local or shared.
        key: see `cache_key`.
        build: fills the folder that it is given.
    """
    folder = pathlib.Path(folder)
    target = folder / key
    if target.is_dir():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / f"{key}.lock"):
        if target.is_dir():
            return target
        with atomic.writing_directory(target) as unfinished:
            build(unfinished)
    return target


def write_examples(
    folder: pathlib.Path,
    chunks: Iterable[Sequence[Entry]],
    *,
    sources: Sequence[str],
    description: str,
) -> None:
    """Writes examples, some at a time, into an empty folder.

    Args:
        folder: where to.
        chunks: the examples in order; each split keeps its own order.
        sources: the names of all sources; a source id is an index into them.
        description: what TFDS says of the dataset.

    Raises:
        ValueError: no example is in the training split.
    """
    writer: tfds.core.SequentialWriter | None = None
    index: dict[Split, list[tuple[int, int, int, int]]] = {}
    for chunk in chunks:
        by_split: dict[Split, list[dict[str, Any]]] = {}
        for split, source, example in chunk:
            by_split.setdefault(split, []).append(_features_of(example, source))
            index.setdefault(split, []).append(
                (
                    len(example.token_ids),
                    num_trained(example.trained_mask),
                    sources.index(source),
                    example.kind_id,
                )
            )
        if writer is None:
            writer = _new_writer(folder, description)
        writer.initialize_splits(list(by_split), fail_if_exists=False)
        writer.add_examples(by_split)
    if writer is None or "train" not in index:
        raise ValueError("no dialogue is left to train on; see the counts of what was dropped")
    writer.close_all()
    arrays: dict[str, Any] = {split: np.array(rows, np.int64) for split, rows in index.items()}
    np.savez(folder / _INDEX_FILE, sources=np.array(sources), **arrays)


class TokenDataset:
    """One split of a cache: its examples by index, and what is known of all of them.

    Attributes:
        sources: the names of the sources.
        lengths, num_trained, source_ids, kind_ids: of every example, `[number of examples]`.
    """

    def __init__(self, folder: str | os.PathLike[str], split: Split) -> None:
        """Opens a split; it has to exist (`has_split`)."""
        with np.load(pathlib.Path(folder) / _INDEX_FILE) as index:
            self.sources: tuple[str, ...] = tuple(index["sources"].tolist())
            columns: Indices = index[split].T
        self.lengths, self.num_trained, self.source_ids, self.kind_ids = columns
        self._examples = tfds.builder_from_directory(folder).as_data_source(split)
        if len(self._examples) != len(self):
            raise ValueError(
                f"{folder}: {len(self._examples)} examples of split {split!r} where its index has "
                f"{len(self)}; delete this folder to have it built again"
            )

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:
        """Reads one example."""
        record = self._examples[int(index)]
        return Example(
            token_ids=record["token_ids"],
            trained_mask=record["trained_mask"],
            kind=ALL_KINDS[self.kind_ids[index]],
            id=record["id"].decode("utf-8", "surrogatepass"),
        )


def has_split(folder: str | os.PathLike[str], split: Split) -> bool:
    """Tells whether a cache has any example of a split."""
    with np.load(pathlib.Path(folder) / _INDEX_FILE) as index:
        return split in index


def _new_writer(folder: pathlib.Path, description: str) -> tfds.core.SequentialWriter:
    vector = {"shape": (None,), "encoding": tfds.features.Encoding.BYTES}
    features = tfds.features.FeaturesDict(
        {
            "token_ids": tfds.features.Tensor(dtype=np.int32, **vector),
            "trained_mask": tfds.features.Tensor(dtype=np.bool_, **vector),
            "kind": tfds.features.Text(),
            "id": tfds.features.Text(),
            "source": tfds.features.Text(),
        }
    )
    identity = tfds.core.DatasetIdentity(
        name=_DATASET_NAME,
        version=tfds.core.Version(_FORMAT),
        data_dir=os.fspath(folder),
        module_name=__name__,
    )
    info = tfds.core.DatasetInfo(builder=identity, description=description, features=features)
    return tfds.core.SequentialWriter(
        info, max_examples_per_shard=_EXAMPLES_PER_FILE, file_format="array_record"
    )


def _features_of(example: Example, source: str) -> dict[str, Any]:
    return {
        "token_ids": example.token_ids,
        "trained_mask": example.trained_mask,
        "kind": example.kind,
        "id": example.id.encode("utf-8", "surrogatepass"),
        "source": source,
    }


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    """Waits for a file's lock; the kernel lets go of it when a process ends, however it ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
