"""Answers in files: of dialogues, of comparisons, or of several answers a prompt."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from huatuo_jax.comparisons.data import Answer, AnswersConfig, make_answer, tokenize_answers
from huatuo_jax.data.files import Row, read_rows
from huatuo_jax.data.readers import read_records
from huatuo_jax.data.records import Comparison, Dialogue, Message, Messages, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Answered(NamedTuple):
    """A record of a file with its answers.

    Attributes:
        record: as JSON, extra fields kept.
        prompt: what the answers answer.
        answers: continuations of it that end with the doctor.
        several: whether the record can hold more than one, as opposed to a dialogue.
    """

    record: dict[str, Any]
    prompt: Messages
    answers: tuple[Messages, ...]
    several: bool

    @property
    def dialogues(self) -> list[Messages]:
        """Each answer behind its prompt."""
        return [self.prompt + answer for answer in self.answers]


def read_answered(path: str, *, encoding: str | None = None) -> Iterator[Answered]:
    """The records of a file of dialogues, of comparisons, or of several answers a prompt.

    Raises:
        ValueError: it cannot be read, or holds records without an answer.
    """
    rows = read_rows(path, encoding=encoding)
    first = next((row for row in rows if isinstance(row, Row)), None)
    if first is not None and _is_answers_record(first.value):
        yield from _read_answers_file(path, encoding)
        return
    answers: tuple[Messages, ...]
    for record in read_records(path, encoding=encoding):
        if isinstance(record, Dialogue):
            prompt, answers = record.messages[:-1], (record.messages[-1:],)
        elif isinstance(record, Comparison):
            prompt, answers = record.messages, (record.chosen, record.rejected)
        else:
            kind = type(record).__name__
            raise ValueError(f"{path}: record {record.id!r} is a {kind}, which holds no answer")
        yield Answered(record.to_json(), prompt, answers, isinstance(record, Comparison))


def read_answers(
    path: str, cfg: AnswersConfig, tokenizer: "PreTrainedTokenizerBase"
) -> list[Answer]:
    """All answers of a file as tokens; those that cannot be said in the template are left out.

    Raises:
        ValueError: as `read_answered`, or no answer is left.
    """
    records = list(read_answered(path))
    tokens = tokenize_answers(
        (dialogue for record in records for dialogue in record.dialogues), cfg, tokenizer
    )
    answers = []
    for record in records:
        for continuation in record.answers:
            found = tokens[record.prompt + continuation]
            if not isinstance(found, str):
                answers.append(make_answer(found, record.prompt, continuation))
    if not answers:
        raise ValueError(f"{path}: none of its answers fits max_length={cfg.max_length} tokens")
    return answers


def answers_hash(answers: Sequence[Answer]) -> str:
    """A hash of all tokens."""
    whole = hashlib.sha256()
    for answer in answers:
        whole.update(answer.token_ids.tobytes() + b"\0")
    return whole.hexdigest()[:32]


def _is_answers_record(row: object) -> bool:
    """Whether it is a record as `huatuo_jax.generation` writes it; scored lists are comparisons."""
    if not isinstance(row, Mapping) or not {"id", "messages", "source", "answers"} <= row.keys():
        return False
    answers = row["answers"]
    return isinstance(answers, list) and all(
        isinstance(one, Mapping) and "text" in one and "score" not in one for one in answers
    )


def _read_answers_file(path: str, encoding: str | None) -> Iterator[Answered]:
    for row in read_rows(path, encoding=encoding):
        if not isinstance(row, Row):
            raise ValueError(str(row))
        if not _is_answers_record(row.value):
            raise ValueError(
                f"{row.file} line {row.line}: not an answers record (id, messages, source, answers "
                "with text), while the first one is"
            )
        prompt = Prompt.from_json(row.value).messages
        texts = [one["text"] for one in row.value["answers"]]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{row.file} line {row.line}: an answer's text is no text")
        answers = tuple((Message("assistant", text),) for text in texts)
        yield Answered(dict(row.value), prompt, answers, True)
