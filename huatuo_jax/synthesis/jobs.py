"""Jobs that make candidate rows: each asks the teacher, and may give up with a reason.

A job is a generator. It yields the requests of one step and is sent their replies, or yields
proposals and is sent whether each is new; in the end it returns its results. The runner takes many
jobs a step at a time, so that which step a job is at follows from the replies alone, and a run that
was killed comes back to the same point by the replies that are kept.
"""

import dataclasses
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar, get_args

from huatuo_jax.data.records import Json, Messages
from huatuo_jax.evaluation.session import judged_text
from huatuo_jax.judge.chat import ChatReply
from huatuo_jax.judge.replies import BadReply, check_ending, final_answer
from huatuo_jax.synthesis import checks

Item = TypeVar("Item")
Accepted = TypeVar("Accepted")

Task = Literal["instruct", "answer", "patient", "doctor", "polish", "question", "verify"]
"""What the teacher is asked for: instructions, the answer to one, a turn of the patient or the
doctor, polished answers, an open question, whether a question is clear."""

TASKS: tuple[Task, ...] = get_args(Task)


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request to the teacher.

    Attributes:
        step: unlike the job's other requests; its reply is found by it.
        task: what is asked for.
        messages: for a model that follows instructions.
        plain: the bare question or dialogue, for a model that only answers as a doctor.
        material: what the clinic's teacher, which reads no text, works from.
        attempt: from 1 on; above 1 where the replies before it were faulty.
    """

    step: str
    task: Task
    messages: Sequence[Mapping[str, str]]
    plain: Sequence[Mapping[str, str]] = ()
    material: Mapping[str, Any] = field(default_factory=dict)
    attempt: int = 1


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A prompt that has to be new before an answer to it is asked for."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A row that passed the checks of its kind.

    Attributes:
        messages: of the row.
        prompt: its text that near-duplicates are found by.
        labels: such as department and role, for the report's distributions.
        extra: further fields of the row.
        row: fields in place of the messages, for a kind whose rows are no dialogues.
        proposed: the prompt was found to be new by a proposal.
    """

    messages: Messages
    prompt: str
    labels: Mapping[str, str] = field(default_factory=dict)
    extra: Json = field(default_factory=dict)
    row: Json | None = None
    proposed: bool = False


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """A candidate that is left out.

    Attributes:
        reason: a word or two, one of few.
        detail: what was found.
        sample: the rejected text.
        labels: as a candidate's.
    """

    reason: str
    detail: str = ""
    sample: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)


class Rejected(Exception):
    """Raised by a job that gives up its only candidate."""

    def __init__(
        self, reason: str, detail: str = "", sample: str = "", *, final: bool = False
    ) -> None:
        """Sets the reason, see `Rejection`, and whether the same request would be in vain."""
        super().__init__(f"{reason}: {detail}")
        self.final = final
        self.rejection = Rejection(reason=reason, detail=detail, sample=sample)

    def after(self, before: str, labels: Mapping[str, str]) -> "Rejection":
        """Returns the rejection with labels, and in its sample what the faulty reply followed."""
        sample = f"{before}\n>> {self.rejection.sample}"
        return dataclasses.replace(self.rejection, sample=sample, labels=labels)


Result = Candidate | Rejection
Verdict = Rejection | None
Step = Sequence[Request] | Sequence[Proposal]
Job = Generator[Step, list[Any], Sequence[Result]]
"""Yields requests and gets `ChatReply`, or yields proposals and gets a `Verdict` for each."""


class Maker(Protocol):
    """One kind of data: where its candidates come from."""

    @property
    def kind(self) -> str:
        """Its name on the command line."""

    @property
    def num_candidates(self) -> int | None:
        """The number of candidates; None for no end."""

    def settings(self) -> dict[str, Any]:
        """Returns what decides its requests: prompts, seeds, tables, hashes of source files."""

    def batch(self, number: int, kept: Sequence[Candidate]) -> list[tuple[str, Job]]:
        """Returns the jobs of a batch by their ids; none where the source is exhausted.

        Args:
            number: of the batch, from 0 on.
            kept: the rows of all batches before it.
        """

    def assumed(self, request: Request) -> str:
        """Returns a reply of usual length, for the estimate of a dry run."""


def jobs_of(
    items: Sequence[Item],
    make: Callable[[int, Item], Job],
    *,
    first: int,
    name: str,
) -> list[tuple[str, Job]]:
    """Returns the jobs of a batch of a source, by their ids.

    Args:
        items: the batch, a job for each.
        make: makes the job of an item and its place in the source.
        first: place of the first item.
        name: the beginning of the ids.
    """
    return [(f"{name}-{place:06d}", make(place, one)) for place, one in enumerate(items, first)]


def ask(request: Request) -> Generator[Step, list[Any], str]:
    """Yields one request and returns the text of its reply."""
    (reply,) = yield [request]
    return text_of(reply)


def ask_again(
    requests: Sequence[Request], accept: Callable[[int, str], Accepted], *, attempts: int
) -> Generator[Step, list[Any], list[Accepted]]:
    """Yields requests, those with a faulty reply again, and returns what was made of the replies.

    Each attempt is a step of its own, `STEP.1`, `STEP.2` and so on.

    Args:
        requests: none needs the reply to another.
        accept: makes something of a request's place and its reply's text; raises Rejected for a
            faulty one.
        attempts: requests for one reply, at most.

    Raises:
        Rejected: the last fault, of a request without a reply that is accepted; or at once, where
            it is final.
    """
    found: dict[int, Accepted] = {}
    fault: Rejected | None = None
    for attempt in range(1, attempts + 1):
        left = [place for place in range(len(requests)) if place not in found]
        replies = yield [
            dataclasses.replace(one, step=f"{one.step}.{attempt}", attempt=attempt)
            for one in (requests[place] for place in left)
        ]
        for place, reply in zip(left, replies, strict=True):
            try:
                found[place] = accept(place, text_of(reply))
            except Rejected as rejected:
                if rejected.final:
                    raise
                fault = rejected
        if len(found) == len(requests):
            return [found[place] for place in range(len(requests))]
    assert fault is not None
    raise fault


def text_of(reply: ChatReply) -> str:
    """Returns the text of a reply without its thoughts.

    Raises:
        Rejected: there is none, it is empty, or did not come to its end. Final where the server did
            not take the request; a model that refused it may do otherwise when it is asked again.
    """
    if reply.text is None:
        told = reply.error or reply.failure or ""
        if reply.failure != "refused":
            raise Rejected("no reply", told)
        if reply.finish_reason is not None:
            raise Rejected("refusal", told)
        raise Rejected("refused by the server", told, final=True)
    text = judged_text(reply)
    try:
        check_ending(reply.finish_reason)
    except BadReply as bad:
        reason = "refusal" if bad.failure == "refused" else "cut off"
        hint = "; see --max_new_tokens" if bad.failure == "truncated" else ""
        raise Rejected(reason, f"{bad}{hint}", text) from bad
    if not text:
        raise Rejected("empty reply", "", reply.text)
    return text


def with_labels(result: Result, labels: Mapping[str, str]) -> Result:
    """Adds labels to a result that has none."""
    return result if result.labels else dataclasses.replace(result, labels=dict(labels))


def object_of(text: str) -> dict[str, Any]:
    """Returns the JSON object of a reply, bare or in a code fence, thoughts before it apart.

    Raises:
        Rejected: there is none, as the teacher declines or as its JSON is broken.
    """
    try:
        return final_answer(text)[1]
    except BadReply as bad:
        refused = checks.refusal(text)
        reason, detail = ("broken JSON", str(bad)) if refused is None else ("refusal", refused)
        raise Rejected(reason, detail, text) from bad
