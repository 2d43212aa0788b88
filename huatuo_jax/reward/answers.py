"""Answers in files: of dialogues, of comparisons, or of several answers a prompt."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from huatuo_jax.comparisons.data import (
    Answer,
    AnswerKey,
    AnswersConfig,
    AnswersToPrompt,
    answers_of,
    make_answer,
    tokenize_answers,
)
from huatuo_jax.data.accounting import Account
from huatuo_jax.data.answers import AnswerToTokenize, Sampled, SampledPrompt
from huatuo_jax.data.files import Row, read_rows
from huatuo_jax.data.readers import read_records
from huatuo_jax.data.records import Comparison, Dialogue, Message, Prompt, unmarked

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Answered(NamedTuple):
    """A record of a file with its answers.

    Attributes:
        record: as JSON, extra fields kept.
        to_prompt: the prompt and its answers, which end with the doctor.
        several: whether the record can hold more than one, as opposed to a dialogue.
        place: file and line of the record.
    """

    record: dict[str, Any]
    to_prompt: AnswersToPrompt
    several: bool
    place: str

    @property
    def keys(self) -> list[AnswerKey]:
        """Each answer behind its prompt, as `tokenize_answers` names it."""
        prompt, answers, sampled_prompt = self.to_prompt
        return [(prompt, sampled_prompt, answer) for answer in answers]


def read_answered(
    path: str, account: Account, *, encoding: str | None = None
) -> Iterator[Answered]:
    """The records of a file of dialogues, of comparisons, or of several answers a prompt.

    Args:
        path: the file.
        account: is told of its rows.
        encoding: of a text file; None tells it by evidence.

    Raises:
        ValueError: it cannot be read, or holds records without an answer.
    """
    rows = read_rows(path, encoding=encoding)
    first = next((row for row in rows if isinstance(row, Row)), None)
    if first is not None and _is_answers_record(first.value):
        for answered in _read_answers_file(path, encoding):
            account.rows += 1
            account.rows_used += 1
            yield answered
        return
    reading = read_records(path, encoding=encoding, empty_answers=True)
    for record in reading:
        if isinstance(record, Dialogue):
            *prompt, answer = unmarked(record.messages)
            to_prompt = AnswersToPrompt(tuple(prompt), (AnswerToTokenize((answer,)),))
        elif isinstance(record, Comparison):
            to_prompt = answers_of(record)
        else:
            kind = type(record).__name__
            raise ValueError(f"{path}: record {record.id!r} is a {kind}, which holds no answer")
        several, place = isinstance(record, Comparison), f"{path}:{reading.line}"
        yield Answered(record.to_json(), to_prompt, several, place)
    account.add_rows(reading)


def read_answers(
    path: str,
    cfg: AnswersConfig,
    tokenizer: "PreTrainedTokenizerBase",
    account: Account | None = None,
) -> list[Answer]:
    """All answers of a file as tokens; those that do not fit are left out and counted.

    Args:
        path: the file.
        cfg: how they are said.
        tokenizer: the model's.
        account: is told of all rows and answers.

    Raises:
        ValueError: as `read_answered`, or more answers do not fit than `cfg.max_left_out_share`.
    """
    account = Account("answers") if account is None else account
    records = list(read_answered(path, account))
    tokens = tokenize_answers((record.to_prompt for record in records), cfg, tokenizer)
    answers = []
    for record in records:
        for key in record.keys:
            found = tokens[key]
            if isinstance(found, str):
                account.leave_out(found, record.place)
                continue
            account.use("to be scored")
            answers.append(make_answer(found, key[0], key[2].messages))
    limit = f"max_length={cfg.max_length}"
    account.check(cfg.max_left_out_share, name="max_left_out_share", limit=limit)
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
        try:
            answers = tuple(map(_answer, row.value["answers"]))
            to_prompt = AnswersToPrompt(prompt, answers, SampledPrompt.from_fields(row.value))
        except ValueError as error:
            raise ValueError(f"{row.file} line {row.line}: {error}") from error
        yield Answered(dict(row.value), to_prompt, True, f"{row.file}:{row.line}")


def _answer(fields: Mapping[str, Any]) -> AnswerToTokenize:
    if not isinstance(fields["text"], str):
        raise ValueError("an answer's text is no text")
    return AnswerToTokenize((Message("assistant", fields["text"]),), Sampled.from_fields(fields))
