"""A judge's interface, and its verdicts on one answer or two as lines of a labels file.

A labels file is append-only. A judgement that failed is a line with `null` for its verdict, an
`error` in words and the kind of `failure`; when the same question is answered later, that line
supersedes it. `current` returns what holds, at most one judgement of a question.
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import time
import typing
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

from huatuo_jax.core.files import AppendedFile, as_path, read_lines
from huatuo_jax.data.records import Prompt, messages_to_json

Item = TypeVar("Item")
Protocol = Literal["score", "pairwise"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)
CRITERIA = ("informative", "coherent", "preferred", "accurate", "overall")
# Why there is no verdict: the server or the model refuses the question; the reply reached its token
# limit; the reply is not in the requested format; no attempt got a reply.
Failure = Literal["refused", "truncated", "unreadable", "unanswered"]
FAILURES: tuple[Failure, ...] = get_args(Failure)

# In the order of the file's lines.
_COMMON = (
    "judge",
    "template",
    "reason",
    "raw",
    "usage",
    "cost",
    "latency_s",
    "error",
    "failure",
    "max_tokens",
    "key",
    "prompt_sha256",
    "answer_sha256",
)
# Lines written before these fields existed lack them.
_MAY_LACK = {"failure", "max_tokens"}
# The fields that hold the index of each answer shown.
INDEX_NAMES: Mapping[Protocol, tuple[str, ...]] = {
    "score": ("answer",),
    "pairwise": ("first", "second"),
}
_OF_PROTOCOL: Mapping[Protocol, tuple[str, ...]] = {
    "score": (*INDEX_NAMES["score"], "scores"),
    "pairwise": (*INDEX_NAMES["pairwise"], "p_first"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judgement:
    """One question to a judge, and its verdict.

    Attributes:
        id: of the prompt.
        key: hash of the question: the judge's settings, the template, the texts, their order.
        protocol: "score" asks for one answer's scores, "pairwise" for the better of two.
        answer: score: index of the answer among the prompt's.
        first: pairwise: index of the answer shown first.
        second: pairwise: index of the answer shown second.
        scores: score: a number for each of `CRITERIA`; None where the judgement failed.
        p_first: pairwise: 1, 0, 0.5, or the probability that the first is the better one; None
            where the judgement failed.
        judge: the judge's name.
        template: hash of the prompt template.
        reason: why, in the judge's words.
        raw: the unparsed reply.
        usage: tokens, as the server counted them, of all calls for this judgement.
        cost: money for all these calls; None where there is no price.
        latency_s: of the last call.
        error: why it failed; None where it did not.
        failure: the kind of failure; None where it did not fail, or the kind is unknown.
        max_tokens: the token limit at which a truncated reply ended; None otherwise.
        prompt_sha256: hash of the prompt's messages.
        answer_sha256: hashes of the judged texts, in the order shown.
    """

    id: str
    key: str
    protocol: Protocol
    answer: int | None = None
    first: int | None = None
    second: int | None = None
    scores: Mapping[str, float] | None = None
    p_first: float | None = None
    judge: str
    template: str
    reason: str | None = None
    raw: str | None = None
    usage: Mapping[str, Any] | None = None
    cost: float | None = None
    latency_s: float | None = None
    error: str | None = None
    failure: Failure | None = None
    max_tokens: int | None = None
    prompt_sha256: str
    answer_sha256: tuple[str, ...]

    def __post_init__(self) -> None:
        """Validates that the fields fit the protocol and hold either a verdict or an error."""
        if self.protocol not in PROTOCOLS:
            raise ValueError(
                f"protocol is {self.protocol!r}; it should be one of {', '.join(PROTOCOLS)}"
            )
        for protocol, names in _OF_PROTOCOL.items():
            if protocol != self.protocol:
                given = [name for name in names if getattr(self, name) is not None]
                if given:
                    raise ValueError(f"{given[0]} does not belong to the {self.protocol} protocol")
        if any(not isinstance(index, int) or index < 0 for index in self.answers):
            raise ValueError(f"answers {self.answers} should be whole numbers from 0 on")
        if len(self.answer_sha256) != len(self.answers):
            raise ValueError(f"{len(self.answer_sha256)} hashes for {len(self.answers)} answers")
        if self.failed == (self.error is None):
            raise ValueError("a judgement needs either a verdict or an error, and not both")
        if self.failure is not None and (self.error is None or self.failure not in FAILURES):
            raise ValueError(
                f"failure is {self.failure!r}; beside an error it should be one of"
                f" {', '.join(FAILURES)}, and null otherwise"
            )
        if (self.failure == "truncated") != (self.max_tokens is not None):
            raise ValueError("max_tokens belongs to the failure 'truncated', and to no other")
        if self.scores is not None:
            _check_scores(self.scores)
        if self.p_first is not None and not 0.0 <= self.p_first <= 1.0:
            raise ValueError(f"p_first is {self.p_first}; it should lie between 0 and 1")

    @property
    def failed(self) -> bool:
        """Returns True if there is no verdict."""
        return (self.scores if self.protocol == "score" else self.p_first) is None

    @property
    def answers(self) -> tuple[int, ...]:
        """Returns the indices of the judged answers, in the order shown."""
        return tuple(getattr(self, name) for name in INDEX_NAMES[self.protocol])

    @property
    def identity(self) -> tuple[str, str, tuple[int, ...]]:
        """Returns key, prompt id and answers; a labels file has one current judgement of each."""
        return self.key, self.id, self.answers

    def to_json(self) -> dict[str, Any]:
        """Returns the record of the labels file, with the fields of its protocol."""
        names = ("id", "protocol", *_OF_PROTOCOL[self.protocol], *_COMMON)
        row = {name: getattr(self, name) for name in names}
        for name in ("scores", "usage"):
            if row.get(name) is not None:
                row[name] = dict(row[name])
        return {**row, "answer_sha256": list(self.answer_sha256)}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "Judgement":
        """Returns the judgement that `to_json` wrote.

        Raises:
            ValueError: a field is missing, unknown or invalid.
        """
        protocol = row["protocol"] if "protocol" in row else None
        if protocol not in PROTOCOLS:
            raise ValueError(
                f"protocol is {protocol!r}; it should be one of {', '.join(PROTOCOLS)}"
            )
        names = {"id", "protocol", *_OF_PROTOCOL[protocol], *_COMMON}
        lacking, unknown = sorted(names - set(row) - _MAY_LACK), sorted(set(row) - names)
        if lacking or unknown:
            raise ValueError(f"a judgement without {lacking} and with unknown {unknown}")
        if not isinstance(row["answer_sha256"], list):
            raise ValueError("answer_sha256 should be a list")
        return cls(**{**row, "answer_sha256": tuple(row["answer_sha256"])})


def question_key(
    *,
    settings: Mapping[str, Any],
    protocol: Protocol,
    template: str,
    prompt: Prompt,
    texts: Sequence[str],
) -> str:
    """Returns a hash of everything that decides a judgement: judge, template, texts and order.

    The prompt's id and the answers' indices are left out, so that equal texts are one question.
    """
    asked = [
        dict(settings),
        protocol,
        template,
        messages_to_json(prompt.messages),
        prompt.reference,
        prompt.diagnosis,
        list(texts),
    ]
    return sha256(json.dumps(asked, ensure_ascii=False, sort_keys=True, allow_nan=False))


def prompt_hash(prompt: Prompt) -> str:
    """Returns the hash of a prompt's messages that `prompt_sha256` holds."""
    return sha256(json.dumps(messages_to_json(prompt.messages), ensure_ascii=False))


def printable(text: str) -> str:
    """Returns the text in one line, unprintable characters replaced by U+FFFD.

    These are control characters and lone surrogates, which UTF-8 cannot encode.
    """
    line = " ".join(text.split())
    return "".join(one if one.isprintable() else "\ufffd" for one in line)


async def for_each(
    items: Iterable[Item], work: Callable[[Item], Awaitable[None]], *, concurrency: int
) -> Exception | None:
    """Works on items, several at once, until none is left or one fails.

    After a failure nothing more is begun, but calls under way are finished, which are paid for.

    Returns:
        The first error; None for none.
    """
    waiting = iter(items)
    errors: list[Exception] = []

    async def take() -> None:
        for item in waiting:
            if errors:
                return
            try:
                await work(item)
            except Exception as error:
                errors.append(error)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(concurrency):
            tasks.create_task(take())
    return errors[0] if errors else None


def sha256(text: str) -> str:
    """Returns the SHA-256 of a text in hexadecimal digits."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def read_judgements(path: str | os.PathLike[str]) -> Iterator[Judgement]:
    """Yields the judgements of a labels file in order, failed and superseded ones too.

    An unfinished last line, left by a killed run, is skipped.

    Raises:
        ValueError: a complete line that is not a judgement.
        OSError: the file cannot be read.
    """
    for line in read_lines(path, unfinished="skip"):
        try:
            judgement = Judgement.from_json(line.row)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}:{line.number}: not a judgement: {error}") from error
        yield judgement


def current(judgements: Iterable[Judgement]) -> list[Judgement]:
    """Returns of each question about each answer its verdict, or else its last failure.

    Ordered by prompt id and answers, independent of the order of the judgements.
    """
    standing: dict[tuple[str, str, tuple[int, ...]], Judgement] = {}
    for judgement in judgements:
        before = standing.get(judgement.identity)
        if before is None or before.failed:
            standing[judgement.identity] = judgement
    return sorted(
        standing.values(), key=lambda found: (found.id, found.protocol, found.answers, found.key)
    )


def _check_scores(scores: Mapping[str, float]) -> None:
    if set(scores) != set(CRITERIA):
        raise ValueError(f"scores has {sorted(scores)}; it should have {', '.join(CRITERIA)}")
    for name, score in scores.items():
        if (
            isinstance(score, bool)
            or not isinstance(score, int | float)
            or not math.isfinite(score)
        ):
            raise ValueError(f"scores[{name!r}] is {score!r}; it should be a number")


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A judge's verdict and its cost.

    Attributes:
        scores: from `score`: a number for each of `CRITERIA`.
        p_first: from `compare`: the probability that the first answer is the better one.
        reason: why, in the judge's words.
        raw: the unparsed reply.
        usage: tokens, as the server counted them.
        cost: money; None where there is no price.
        latency_s: seconds of the last call.
    """

    scores: Mapping[str, float] | None = None
    p_first: float | None = None
    reason: str | None = None
    raw: str | None = None
    usage: Mapping[str, Any] | None = None
    cost: float | None = None
    latency_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The expected and the largest cost of a question.

    Attributes:
        calls: requests to a server if none fails.
        input_tokens: estimate.
        max_input_tokens: upper bound.
        max_output_tokens: upper bound.
        cost: with `input_tokens` and all output tokens; None where there is no price.
        max_cost: with `max_input_tokens`; None where there is no price.
    """

    calls: int
    input_tokens: int
    max_input_tokens: int
    max_output_tokens: int
    cost: float | None
    max_cost: float | None


NOTHING = Estimate(
    calls=0, input_tokens=0, max_input_tokens=0, max_output_tokens=0, cost=0.0, max_cost=0.0
)


class JudgementFailed(Exception):
    """This question got no verdict; another question, or a later attempt at this one, may."""

    def __init__(
        self,
        message: str,
        *,
        raw: str | None = None,
        usage: Mapping[str, Any] | None = None,
        cost: float | None = None,
        latency_s: float | None = None,
        failure: Failure = "unreadable",
        max_tokens: int | None = None,
        ends_after: int | None = None,
    ) -> None:
        """Sets the reason, and what the question cost all the same.

        Args:
            message: the reason.
            raw: the unparsed reply.
            usage: tokens, as the server counted them.
            cost: money.
            latency_s: seconds of the last call.
            failure: the kind of failure.
            max_tokens: token limit of a truncated reply.
            ends_after: number of questions that may fail in this way, while none has been
                answered, before the judge counts as unusable; None where the failure concerns this
                question alone.
        """
        super().__init__(printable(message))
        self.raw, self.usage, self.cost, self.latency_s = raw, usage, cost, latency_s
        self.failure, self.max_tokens, self.ends_after = failure, max_tokens, ends_after


class JudgeUnusable(ValueError):
    """The judge cannot answer any question: a wrong key, an unknown model, a spent budget."""


class Judge(typing.Protocol):
    """Scores answers and compares them."""

    @property
    def name(self) -> str:
        """Returns the name that every record holds."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """Returns plain values that decide the verdicts, for the question key; never a secret."""

    def template_hash(self, protocol: Protocol) -> str:
        """Returns the hash of the prompt template, or of its equivalent, for the records."""

    def estimate(self, prompt: Prompt, texts: Sequence[str]) -> Estimate:
        """Estimates the cost of a question about one text (a score) or two (a comparison).

        Raises:
            ValueError: the judge does not take this prompt.
        """

    async def score(self, prompt: Prompt, answer: str) -> Reply:
        """Scores an answer.

        Raises:
            JudgementFailed: there is no verdict.
            JudgeUnusable: no question can get one.
        """

    async def compare(self, prompt: Prompt, first: str, second: str) -> Reply:
        """Returns the probability that the first answer is the better one.

        Raises:
            JudgementFailed: there is no verdict.
            JudgeUnusable: no question can get one.
        """

    async def close(self) -> None:
        """Closes connections and files."""


_TO_DISK_EVERY_S = 1.0


class LabelsFile(contextlib.AbstractContextManager["LabelsFile"]):
    """A labels file opened for one run; a context manager.

    It is made with its first judgement, so that a run that cannot start leaves nothing behind. A
    kill of the process loses no judgement that was appended; a crash of the machine may lose those
    of the last second, which are then asked for again.

    Attributes:
        found: the judgements that were there, failed and superseded ones too.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Opens the file, if it exists, and cuts off an unfinished last line.

        Args:
            path: the file.

        Raises:
            ValueError: it holds something else, or another process writes it.
            OSError: it cannot be read or written.
        """
        self._path = as_path(path)
        self._file: AppendedFile | None = None
        self._synced_s = time.monotonic()
        self.found: list[Judgement] = []
        if self._path.exists():
            self._open()

    def __exit__(self, *_: object) -> None:
        """Flushes the file to disk and closes it."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def append(self, judgements: Sequence[Judgement]) -> None:
        """Appends judgements; a killed run leaves the first few of them."""
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
