"""Tokenised dialogues: a template with its tokenizer, run in parallel, and the cache on disk.

Packing, mixture and batches know examples only; a `DialogueTokenizer` is all that they need of a
template and its tokenizer.

A cache is a folder of ArrayRecord files that `tfds.builder_from_directory` opens like any dataset
of TFDS, without TensorFlow, with random access. `index.npz` beside it holds the numbers of every
example that planning needs. It is written by `tfds.core.SequentialWriter`: a
`GeneratorBasedBuilder` holds back all examples to shuffle them, and calls TensorFlow beyond 1 GB.
"""

import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import pathlib
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from huatuo_jax.core.files import (
    as_path,
    is_address,
    local_copy,
    locked,
    make_folder,
    staged_folder,
)
from huatuo_jax.core.folders import is_written, writing_directory
from huatuo_jax.data.chat.template import (
    ChatTemplate,
    NothingToTrain,
    TrainedTurns,
    TruncationPolicy,
    truncate,
)
from huatuo_jax.data.mixture import Indices
from huatuo_jax.data.records import KINDS, Messages

if TYPE_CHECKING:
    import tensorflow_datasets as tfds
    from transformers import PreTrainedTokenizerBase

TokenIds = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]
DropReason = Literal["too long", "cannot be rendered", "nothing to train"]
Split = Literal["train", "held_out"]
Item = TypeVar("Item")
Found = TypeVar("Found")

CHUNK_SIZE = 64  # dialogues a process gets at once
_CHUNKS_AHEAD = 4  # per process, so that none waits and memory is bounded
_NOT_OF_THE_IDS = ("name_or_path", "is_local", "local_files_only", "padding", "truncation")
_DATASET_NAME = "dialogues"
_FORMAT = "1.1.0"  # A cache of another format has another key.
_EXAMPLES_PER_FILE = 50_000
_INDEX_FILE = "index.npz"

UNKNOWN_KIND = "unknown"
"""The kind of a dialogue whose source names none."""

ALL_KINDS: tuple[str, ...] = (*KINDS, UNKNOWN_KIND)
"""All kinds; a kind id is an index into these, in every dataset."""


@dataclass(frozen=True, slots=True)
class Example:
    """One dialogue as tokens.

    `trained_mask[t]` belongs to the predicted token: token t is learned from the tokens before it.
    `kind` is one of `ALL_KINDS`.
    """

    token_ids: TokenIds
    trained_mask: Mask
    kind: str
    id: str

    @property
    def kind_id(self) -> int:
        """The kind as an index into `ALL_KINDS`."""
        return ALL_KINDS.index(self.kind)

    def __post_init__(self) -> None:
        """Refuses an unknown kind, and arrays that are not one vector each, of one length."""
        if self.kind not in ALL_KINDS:
            raise ValueError(
                f"example {self.id!r}: kind {self.kind!r} should be one of {ALL_KINDS}"
            )
        if self.token_ids.ndim != 1 or self.token_ids.shape != self.trained_mask.shape:
            raise ValueError(
                f"example {self.id!r}: token_ids {self.token_ids.shape} and trained_mask "
                f"{self.trained_mask.shape} should be vectors of one length"
            )


class Tokens(NamedTuple):
    """A dialogue's ids and mask, and the number of messages dropped to make it fit."""

    token_ids: TokenIds
    trained_mask: Mask
    num_messages_dropped: int = 0


class Dropped(NamedTuple):
    """A dropped dialogue: the reason, by which drops are counted, and a detail of its own."""

    reason: DropReason
    detail: str


class DialogueTokenizer(Protocol):
    """Tokenises messages; it is sent to other processes, so it has to pickle."""

    @property
    def identity(self) -> str:
        """All settings of the ids: two tokenizers of one identity give the same ids."""
        ...

    def __call__(self, messages: Messages) -> Tokens | Dropped:
        """Returns the tokens of a dialogue, or the reason for dropping it."""
        ...


def num_trained(trained_mask: Mask) -> int:
    """Counts the tokens with a loss; the first token is not predicted from anything."""
    return int(np.count_nonzero(trained_mask[1:]))


@dataclass(frozen=True, kw_only=True)
class TemplateTokenizer:
    """A chat template and a tokenizer as one `DialogueTokenizer`.

    Attributes:
        max_tokens: the length limit of an example, at most that of a row.
        policy: for a longer dialogue, see `huatuo_jax.data.chat.template.truncate`.
        trained: the assistant turns that are trained.
    """

    template: ChatTemplate
    tokenizer: "PreTrainedTokenizerBase"
    max_tokens: int
    policy: TruncationPolicy = "drop_oldest_turns"
    trained: TrainedTurns = "all"

    @property
    def identity(self) -> str:
        """The template's settings, the limits, and a hash of the tokenizer's content."""
        return (
            f"{self.template!r} max_tokens={self.max_tokens} policy={self.policy} "
            f"trained={self.trained} tokenizer={tokenizer_hash(self.tokenizer)}"
        )

    def __call__(self, messages: Messages) -> Tokens | Dropped:
        """Renders a dialogue; drops one that the template refuses, with the reason.

        Also drops one whose answers are all marked as not to be trained.
        """
        try:
            rendered, num_messages_dropped = truncate(
                self.template,
                messages,
                self.tokenizer,
                max_tokens=self.max_tokens,
                policy=self.policy,
                trained=self.trained,
            )
        except NothingToTrain as error:
            return Dropped("nothing to train", str(error))
        except ValueError as error:
            return Dropped("cannot be rendered", str(error))
        if rendered is None:
            return Dropped("too long", f"does not fit {self.max_tokens} tokens")
        return Tokens(
            np.array(rendered.token_ids, np.int32),
            np.array(rendered.trained_mask, np.bool_),
            num_messages_dropped,
        )


def tokenizer_hash(tokenizer: "PreTrainedTokenizerBase", *, chat_template: bool = True) -> str:
    """Returns a hash of a tokenizer's saved files, without the place it was loaded from.

    Args:
        tokenizer: the tokenizer.
        chat_template: whether its chat template counts, which does not affect the ids of a text.
    """
    whole = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(pathlib.Path(folder).rglob("*")):
            if not path.is_file() or (path.suffix == ".jinja" and not chat_template):
                continue
            content = path.read_bytes()
            if path.suffix == ".json":
                fields = json.loads(content)
                kept = {name: fields[name] for name in fields if name not in _NOT_OF_THE_IDS}
                content = json.dumps(kept, sort_keys=True).encode()
            whole.update(hashlib.sha256(path.name.encode() + b"\0" + content).digest())
    return whole.hexdigest()[:32]


class Progress(NamedTuple):
    """The progress of tokenising, for a progress bar."""

    num_done: int
    num_dialogues: int
    num_tokens: int
    seconds: float


def tokenize_in_chunks(
    dialogues: Sequence[Item],
    tokenizer: Callable[[Item], Found],
    *,
    num_processes: int,
    progress: Callable[[Progress], None] | None = None,
) -> Iterator[list[Found]]:
    """Tokenises dialogues in order, some dozens at a time.

    Args:
        dialogues: the messages of each, or other arguments of the tokenizer.
        tokenizer: sent to every process once.
        num_processes: 1 works in this process. More are started afresh (not forked: threads of jax
            may hold locks), which takes some seconds, so few dialogues go faster without. The
            calling script then needs the usual `if __name__ == "__main__"`.
        progress: called after every chunk.

    Raises:
        ValueError: `num_processes` is not positive.
        concurrent.futures.process.BrokenProcessPool: a process was killed, mostly for memory.
    """
    if num_processes < 1:
        raise ValueError(f"num_processes: {num_processes}, it should be at least 1")
    starts = range(0, len(dialogues), CHUNK_SIZE)
    chunks = (dialogues[start : start + CHUNK_SIZE] for start in starts)
    results = (
        ([tokenizer(messages) for messages in chunk] for chunk in chunks)
        if num_processes == 1
        else _in_processes(chunks, tokenizer, num_processes)
    )
    began, num_done, num_tokens = time.monotonic(), 0, 0
    for chunk in results:
        num_done += len(chunk)
        num_tokens += sum(len(one.token_ids) for one in chunk if isinstance(one, Tokens))
        if progress is not None:
            seconds = time.monotonic() - began
            progress(Progress(num_done, len(dialogues), num_tokens, seconds))
        yield chunk


def _in_processes(
    chunks: Iterator[Sequence[Item]], tokenizer: Callable[[Item], Found], num_processes: int
) -> Iterator[list[Found]]:
    pool = ProcessPoolExecutor(
        num_processes,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_process,
        initargs=(tokenizer,),
    )
    waiting: deque[Future[list[Found]]] = deque()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(_tokenize_chunk, chunk))
            if len(waiting) >= num_processes * _CHUNKS_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


_tokenizer_of_process: Callable[[Any], Any] | None = None


def _start_process(tokenizer: Callable[[Any], Any]) -> None:
    """Keeps the tokenizer for all chunks of this process, and limits it to one core."""
    global _tokenizer_of_process
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _tokenizer_of_process = tokenizer


def _tokenize_chunk(chunk: Sequence[Any]) -> list[Any]:
    assert _tokenizer_of_process is not None
    return [_tokenizer_of_process(messages) for messages in chunk]


class Entry(NamedTuple):
    """One example to be written into the cache."""

    split: Split
    source: str
    example: Example


def cache_key(inputs: Mapping[str, Any]) -> str:
    """Returns the name of the cache of these inputs, which are JSON values."""
    text = json.dumps({"format": _FORMAT, **inputs}, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:24]


def build_once(
    folder: str | os.PathLike[str], key: str, build: Callable[[pathlib.Path], None]
) -> pathlib.Path:
    """Returns `FOLDER/KEY`, and builds it if it does not exist.

    It is built under a temporary name and renamed when complete, so an interrupted build is never
    used. Of several processes one builds and the others wait for it. From a bucket each process
    reads a copy in the system's folder for temporary files: ArrayRecord reads local files alone.

    Args:
        folder: of all caches, local or shared, or in a bucket.
        key: from `cache_key`.
        build: fills the folder that it is given.
    """
    folder = as_path(folder)
    target = folder / key
    if is_address(folder):
        if not is_written(target):
            with locked(target, waits=True):
                if not is_written(target):
                    _build(target, build)
        return local_copy(target)
    if target.is_dir():
        return target
    make_folder(folder)
    with _locked(folder / f"{key}.lock"):
        if target.is_dir():
            return target
        _build(target, build)
    return target


def _build(target: pathlib.Path, build: Callable[[pathlib.Path], None]) -> None:
    with writing_directory(target) as unfinished, staged_folder(unfinished) as folder:
        build(folder)


def write_examples(
    folder: pathlib.Path,
    chunks: Iterable[Sequence[Entry]],
    *,
    sources: Sequence[str],
    description: str,
) -> None:
    """Writes examples, some at a time, into an empty folder.

    Args:
        folder: the target.
        chunks: the examples in order; each split keeps its own order.
        sources: the names of all sources; a source id is an index into them.
        description: of the dataset in TFDS.

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
        raise ValueError("no dialogue is left to train on; see the counts of dropped dialogues")
    writer.close_all()
    arrays: dict[str, Any] = {split: np.array(rows, np.int64) for split, rows in index.items()}
    np.savez(folder / _INDEX_FILE, sources=np.array(sources), **arrays)


class TokenDataset:
    """One split of a cache: its examples by index, and arrays of numbers of all of them.

    Attributes:
        sources: the names of the sources.
        lengths, num_trained, source_ids, kind_ids: of every example, `[number of examples]`.
    """

    def __init__(self, folder: str | os.PathLike[str], split: Split) -> None:
        """Opens a split, which has to exist (`has_split`)."""
        import tensorflow_datasets as tfds

        with np.load(as_path(folder) / _INDEX_FILE) as index:
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
        """Returns the number of examples."""
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
    """Returns whether a cache has any example of a split."""
    with np.load(as_path(folder) / _INDEX_FILE) as index:
        return split in index


def _new_writer(folder: pathlib.Path, description: str) -> "tfds.core.SequentialWriter":
    import tensorflow_datasets as tfds

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
    """Holds a file's lock; the kernel releases it when the process ends in any way."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
