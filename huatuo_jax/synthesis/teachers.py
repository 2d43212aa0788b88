"""Teachers: a model behind a server, or a saved model behind our own engine in this process.

Every reply is kept in a file of its batch, by its request's name and hash, and every call is booked
before it is sent (`judge.spending`): a run that was killed reads what it has and pays for the rest.
The clinic's teacher, which needs neither server nor weights, is `clinic_teacher`.
"""

import pathlib
from collections.abc import Mapping
from typing import Any, Protocol

from huatuo_jax.core.progress import progress_bar
from huatuo_jax.evaluation.asking import Cost
from huatuo_jax.evaluation.respondents import Respondent
from huatuo_jax.judge.chat import ChatReply
from huatuo_jax.judge.spending import SpendingFile, Totals
from huatuo_jax.synthesis.jobs import Request, Task

Requests = Mapping[str, Request]


class Teacher(Protocol):
    """Whoever answers the requests of jobs."""

    @property
    def name(self) -> str:
        """Its name in rows and reports."""

    def settings(self) -> dict[str, Any]:
        """Returns what decides its replies; no key and no address is among them."""

    def known(self, batch: int, requests: Requests) -> dict[str, ChatReply]:
        """Returns the replies that are there, those without a text included."""

    def cost(self, batch: int, requests: Requests) -> Cost | None:
        """Returns what the requests may take; None where nothing is paid."""

    def respond(self, batch: int, requests: Requests) -> dict[str, ChatReply]:
        """Returns a reply to each request.

        Raises:
            ValueError: it can answer no more (no money, key, model or server); what came before is
                `known`.
        """

    def release(self) -> None:
        """Lets go of the memory that replying took."""

    def totals(self) -> Totals | None:
        """Returns what all runs have spent; None where nothing is paid."""


class ModelTeacher:
    """A model that is asked by messages."""

    def __init__(
        self,
        respondent: Respondent,
        folder: pathlib.Path,
        *,
        spending: pathlib.Path | None,
        plain: bool = False,
    ) -> None:
        """Remembers whom to ask.

        Args:
            respondent: the model.
            folder: of the files of replies, one for each batch.
            spending: the spending file that the respondent writes; None where nothing is paid.
            plain: ask the bare question, for a model that only answers as a doctor.
        """
        self._respondent, self._folder, self._spending = respondent, folder, spending
        self._plain = plain

    @property
    def name(self) -> str:
        """The model's name."""
        return self._respondent.name

    def settings(self) -> dict[str, Any]:
        """Model and decoding."""
        found = self._respondent.settings()
        return {name: found[name] for name in found if name != "base_url"} | {"plain": self._plain}

    def known(self, batch: int, requests: Requests) -> dict[str, ChatReply]:
        """Returns the replies that the batch's file holds to these very requests."""
        return self._respondent.read(self._messages(requests), self._file(batch))

    def cost(self, batch: int, requests: Requests) -> Cost | None:
        """Returns what the requests without a reply may take."""
        return self._respondent.cost(self._messages(requests), self._file(batch))

    def respond(self, batch: int, requests: Requests) -> dict[str, ChatReply]:
        """Returns a reply to each request; see `Respondent.respond`."""
        with progress_bar(f"batch {batch + 1}: {self.name}", "replies") as on_progress:
            messages = self._messages(requests)
            return self._respondent.respond(messages, self._file(batch), on_progress)

    def release(self) -> None:
        """Lets go of weights and compiled programs."""
        self._respondent.release()

    def totals(self) -> Totals | None:
        """Returns the sums of the spending file."""
        if self._spending is None:
            return None
        spending = SpendingFile(self._spending)
        try:
            return spending.totals()
        finally:
            spending.close()

    def _file(self, batch: int) -> pathlib.Path:
        return self._folder / f"{batch:06d}.jsonl"

    def _messages(self, requests: Requests) -> dict[str, list[dict[str, str]]]:
        return {
            name: [dict(one) for one in (request.plain if self._plain else request.messages)]
            for name, request in requests.items()
        }


class SharedTeacher:
    """Two teachers, each for some tasks: such as a doctor's model, and the clinic for the rest."""

    def __init__(self, first: Teacher, second: Teacher, *, seconds: frozenset[Task]) -> None:
        """Remembers both.

        Args:
            first: asked for all other tasks; rows are of its name.
            second: asked for `seconds`.
            seconds: tasks.
        """
        self._first, self._second, self._seconds = first, second, seconds

    @property
    def name(self) -> str:
        """The first one's name."""
        return self._first.name

    def settings(self) -> dict[str, Any]:
        """The settings of both."""
        return {
            "first": self._first.settings(),
            "second": self._second.settings(),
            "seconds": sorted(self._seconds),
        }

    def known(self, batch: int, requests: Requests) -> dict[str, ChatReply]:
        """Returns the replies that are there."""
        first, second = self._parted(requests)
        return self._first.known(batch, first) | self._second.known(batch, second)

    def cost(self, batch: int, requests: Requests) -> Cost | None:
        """Returns what the first one's requests may take."""
        return self._first.cost(batch, self._parted(requests)[0])

    def respond(self, batch: int, requests: Requests) -> dict[str, ChatReply]:
        """Returns a reply to each request."""
        first, second = self._parted(requests)
        found = self._second.respond(batch, second) if second else {}
        return found | (self._first.respond(batch, first) if first else {})

    def release(self) -> None:
        """Lets go of the memory of both."""
        self._first.release()
        self._second.release()

    def totals(self) -> Totals | None:
        """Returns what the first one has spent."""
        return self._first.totals()

    def _parted(self, requests: Requests) -> tuple[Requests, Requests]:
        second = {name: one for name, one in requests.items() if one.task in self._seconds}
        return {name: requests[name] for name in requests if name not in second}, second
