"""Dialogues to tokens: a template with its tokenizer, run over many dialogues in parallel."""

import hashlib
import json
import multiprocessing
import os
import pathlib
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from huatuo_jax.data.chat import (
    ChatTemplate,
    NothingToTrain,
    TrainedTurns,
    TruncationPolicy,
    truncate,
)
from huatuo_jax.data.examples import Dropped, Tokens
from huatuo_jax.data.records import Messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK_SIZE = 64  # dialogues a process gets at once
_CHUNKS_AHEAD = 4  # per process, so that none waits and no more than these stand in memory

Item = TypeVar("Item")
Found = TypeVar("Found")

_NOT_OF_THE_IDS = ("name_or_path", "is_local", "local_files_only", "padding", "truncation")


@dataclass(frozen=True, kw_only=True)
class TemplateTokenizer:
    """A chat template and a tokenizer as one `DialogueTokenizer`.

    Attributes:
        max_tokens: the length limit of an example, at most that of a row.
        policy: what becomes of a longer dialogue, see `huatuo_jax.data.chat.truncate`.
        trained: which of the doctor's turns are trained.
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
        """Renders a dialogue; one that the template refuses is dropped with its words.

        One whose answers are all marked as not to be trained is dropped too, by that reason.
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
    """A hash of all that a tokenizer would save, but for where it was loaded from.

    Args:
        tokenizer: the tokenizer.
        chat_template: whether its chat template counts, which says nothing of how text becomes ids.
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
    """How far tokenising is, for a progress bar."""

    num_done: int
    num_dialogues: int
    num_tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """The speed so far, in tokens kept."""
        return self.num_tokens / max(self.seconds, 1e-9)


def tokenize_in_chunks(
    dialogues: Sequence[Item],
    tokenizer: Callable[[Item], Found],
    *,
    num_processes: int,
    progress: Callable[[Progress], None] | None = None,
) -> Iterator[list[Found]]:
    """Tokenises dialogues in order, some dozens at a time.

    Args:
        dialogues: the messages of each, or whatever else the tokenizer takes.
        tokenizer: it is sent to every process once.
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
    """Keeps the tokenizer for all chunks of this process, and lets it use one core."""
    global _tokenizer_of_process
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _tokenizer_of_process = tokenizer


def _tokenize_chunk(chunk: Sequence[Any]) -> list[Any]:
    assert _tokenizer_of_process is not None
    return [_tokenizer_of_process(messages) for messages in chunk]
