"""Answers prompts, asks the judge and keeps all of it in one folder, for every evaluation suite.

    responses/MODEL.jsonl       every response of a model, as it came
    log_probs/MODEL.jsonl       log-probabilities of the options of exam questions
    judge.jsonl                 every reply of the judge, and of the patient that it plays
    records/SUITE.jsonl         prompt, response and verdict of each item

What is there is not computed or paid for again. In a dry run nothing is sent and no weights are
read: texts that are not there yet are taken as long as they may be, and costs are added up.
"""

import hashlib
import math
import pathlib
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from huatuo_jax.core.files import make_folder, write_rows
from huatuo_jax.core.progress import progress_bar, tell
from huatuo_jax.evaluation.asking import Cost, ReplyFile
from huatuo_jax.evaluation.exam_mentions import final_part
from huatuo_jax.evaluation.respondents import Dialogue, Respondent, SavedRespondent
from huatuo_jax.judge.chat import ChatMessages, ChatModelConfig, ChatReply
from huatuo_jax.judge.judgements import sha256

Item = TypeVar("Item")
Value = TypeVar("Value")

MOST_ATTEMPTS = 3
"""Requests for one verdict, where the replies to the others could not be read."""

_NAME_CHARACTERS = re.compile(r"[^\w.-]+")
_CHARACTERS_PER_TOKEN = 1.5


@dataclass(frozen=True, kw_only=True)
class Read(Generic[Value]):
    """The value read from a reply, and how much of it is missing.

    Attributes:
        value: what the reply says.
        missing: parts that could not be read; the judge is asked again where there are any.
    """

    value: Value
    missing: int


@dataclass(frozen=True, kw_only=True)
class Verdict(Generic[Value]):
    """The final verdict of a judge.

    Attributes:
        value: read from the most complete reply.
        replies: all of them, in order.
    """

    value: Value
    replies: tuple[ChatReply, ...]

    def to_json(self) -> dict[str, Any]:
        """The raw replies."""
        return {"replies": [one._asdict() for one in self.replies]}


class Suite(Protocol):
    """One evaluation suite, its files read and checked."""

    @property
    def name(self) -> str:
        """Its name on the command line."""

    def test_texts(self) -> dict[str, str]:
        """The texts that training data should not hold, by id."""

    def answer(self, session: "Session", model: str) -> None:
        """Has a model answer all prompts, and keeps the responses."""

    def run(self, session: "Session") -> dict[str, Any] | None:
        """Returns the figures of all models as JSON; None in a dry run."""


class ServerJudge:
    """A judge behind a server, with all of its replies in one file."""

    def __init__(self, cfg: ChatModelConfig, path: pathlib.Path, *, key: str | None) -> None:
        """Remembers whom to ask; nothing is sent.

        Args:
            cfg: the judge.
            path: of its replies; the budget holds for all of them.
            key: of the server; None in a dry run.
        """
        self.cfg = cfg
        self._file = ReplyFile(path, cfg, key=key)

    @property
    def name(self) -> str:
        """The model's name on the server."""
        return self.cfg.model

    def settings(self) -> dict[str, Any]:
        """Returns the judge's settings, as a figure's reader needs them; no key is among them."""
        return {
            "judge": self.cfg.model,
            "base_url": self.cfg.server.base_url,
            "max_tokens": self.cfg.max_tokens,
            "temperature": self.cfg.temperature,
        }

    def estimate(self, requests: Mapping[str, ChatMessages]) -> Cost:
        """Estimates the cost of the missing replies, without repetitions."""
        every = {attempt: requests[name] for name in requests for attempt in _attempts(name)}
        standing = self._file.read(every)
        left = {
            name: messages
            for name, messages in requests.items()
            if not any(_has_text(standing.get(attempt)) for attempt in _attempts(name))
        }
        return self._file.estimate(left)

    def replies(self, requests: Mapping[str, ChatMessages]) -> dict[str, ChatReply]:
        """The replies that are there."""
        return self._file.read(requests)

    def ask(self, requests: Mapping[str, ChatMessages], *, label: str) -> dict[str, ChatReply]:
        """A reply to each request; see `ReplyFile.ask`."""
        with progress_bar(label, "replies") as on_progress:
            return self._file.ask(requests, on_progress)

    def verdicts(
        self,
        requests: Mapping[str, ChatMessages],
        read: Callable[[str, ChatReply], Read[Value]],
        *,
        label: str,
    ) -> dict[str, Verdict[Value]]:
        """A verdict for each request, asked again where a reply could not be read.

        Each repetition is a request of its own name, so that its reply is kept beside the others;
        a request that the server refuses is not repeated.

        Args:
            requests: messages by name.
            read: takes a request's name and a reply.
            label: of the progress.

        Raises:
            ValueError: as `ReplyFile.ask`.
        """
        every = {attempt: requests[name] for name in requests for attempt in _attempts(name)}
        standing = self._file.read(every)
        for number in range(MOST_ATTEMPTS):
            left = {}
            for name in requests:
                attempt = _attempts(name)[number]
                known = _known(standing, name)
                whole = any(read(name, one).missing == 0 for one in known)
                refused = any(one.failure == "refused" for one in known)
                if not whole and not refused and not _has_text(standing.get(attempt)):
                    left[attempt] = requests[name]
            if left:
                again = f", again ({number})" if number else ""
                standing |= self.ask(left, label=f"{label}{again}")
        found = {}
        for name in requests:
            known = _known(standing, name)
            best = min((read(name, one) for one in known), key=lambda one: one.missing)
            found[name] = Verdict(value=best.value, replies=tuple(known))
        return found


def _attempts(name: str) -> list[str]:
    return [name, *(f"{name}#{number}" for number in range(2, MOST_ATTEMPTS + 1))]


def _known(standing: Mapping[str, ChatReply], name: str) -> list[ChatReply]:
    return [standing[attempt] for attempt in _attempts(name) if attempt in standing]


def _has_text(reply: ChatReply | None) -> bool:
    return reply is not None and reply.text is not None


class Session:
    """The models, the judge and the output folder of one evaluation."""

    def __init__(
        self,
        models: Mapping[str, Respondent],
        output: pathlib.Path,
        *,
        judge: ServerJudge | None = None,
        second_judge: ServerJudge | None = None,
        seed: int = 0,
        limit: int | None = None,
        max_new_tokens: int = 512,
        dry: bool = False,
    ) -> None:
        """Opens nothing yet.

        Args:
            models: by their names in tables.
            output: folder of all files.
            judge: behind a server; None where there is none.
            second_judge: its verdicts are compared with the judge's.
            seed: of draws and intervals.
            limit: items of a set, drawn by the seed; None for all.
            max_new_tokens: of a response, for the estimate of a dry run.
            dry: nothing is sent, computed or written.
        """
        self.models, self.output = models, output
        self.judge, self.second_judge = judge, second_judge
        self.seed, self.limit, self.dry = seed, limit, dry
        self._plan: Counter[tuple[str, str]] = Counter()
        self._costs: dict[str, list[Cost]] = {}
        self._planned: set[str] = set()
        self._sources: dict[str, str] = {}
        self._max_new_tokens = max_new_tokens
        self._used: Respondent | None = None

    def source(self, model: str) -> str:
        """The model's own name, which its name in tables does not change."""
        if model not in self._sources:
            self._sources[model] = str(self.models[model].settings()["model"])
        return self._sources[model]

    def limited(self, items: Sequence[Item], name: str) -> list[Item]:
        """The first `limit` of a seeded draw, in the order of the set."""
        if self.limit is None or len(items) <= self.limit:
            return list(items)
        drawn = random.Random(f"{self.seed}:{name}").sample(range(len(items)), self.limit)
        return [items[index] for index in sorted(drawn)]

    def responses(
        self, suite: str, model: str, prompts: Mapping[str, Dialogue]
    ) -> dict[str, ChatReply]:
        """A model's response to each prompt of a suite."""
        respondent = self._use(model)
        named = {f"{suite}/{name}": dialogue for name, dialogue in prompts.items()}
        path = self._path("responses", model)
        if self.dry:
            found = respondent.read(named, path)
            left = {name: named[name] for name in named if name not in found}
            self._note(suite, f"responses of {model}", len(left), respondent.cost(left, path))
            found |= {name: self._assumed(f"{model}/{name}") for name in left}
        else:
            with progress_bar(f"{suite}: {model}", "responses") as on_progress:
                found = respondent.respond(named, path, on_progress)
            too_long = sum(one.failure == "too long" for one in found.values())
            if too_long:
                tell(f"{suite}: {too_long} of {len(found)} prompts leave {model} no room to answer")
        return {name: found[f"{suite}/{name}"] for name in prompts}

    def log_probs(
        self, suite: str, model: str, asked: Mapping[str, tuple[str, Sequence[str]]]
    ) -> dict[str, tuple[float, ...] | None]:
        """The log-probabilities of continuations by a saved model; None for texts too long."""
        respondent = self._use(model)
        assert isinstance(respondent, SavedRespondent)
        named = {f"{suite}/{name}": one for name, one in asked.items()}
        if self.dry:
            self._note(suite, f"questions by likelihood of {model}", len(asked), None)
            return dict.fromkeys(asked)
        with progress_bar(f"{suite}: {model}", "questions") as on_progress:
            path = self._path("log_probs", model)
            found = respondent.log_probs_in_file(named, path, on_progress)
        return {name: found[f"{suite}/{name}"] for name in asked}

    def verdicts(
        self,
        suite: str,
        requests: Mapping[str, ChatMessages],
        read: Callable[[str, ChatReply], Read[Value]],
        *,
        judge: ServerJudge | None = None,
    ) -> dict[str, Verdict[Value]]:
        """The judge's verdicts; none in a dry run, which notes their cost."""
        judge = judge or self.judge
        assert judge is not None
        named = {f"{suite}/{name}": messages for name, messages in requests.items()}
        if self.dry:
            cost = judge.estimate(named)
            self._note(suite, f"verdicts of {judge.name}", cost.requests, cost)
            return {}
        cut = len(suite) + 1
        found = judge.verdicts(
            named, lambda name, reply: read(name[cut:], reply), label=f"{suite}: {judge.name}"
        )
        return {name: found[f"{suite}/{name}"] for name in requests}

    def patient_turns(
        self, suite: str, requests: Mapping[str, ChatMessages]
    ) -> dict[str, ChatReply]:
        """Returns the next messages of the patient, who is played by the judge's model."""
        assert self.judge is not None
        named = {f"{suite}/{name}": messages for name, messages in requests.items()}
        if self.dry:
            found = self.judge.replies(named)
            left = {name: named[name] for name in named if name not in found}
            new = {name: left[name] for name in left if name not in self._planned}
            self._planned |= set(new)
            cost = self.judge.estimate(new)
            self._note(suite, f"turns of {self.judge.name} as patient", len(new), cost)
            found |= {name: self._assumed(name, short=True) for name in left}
        else:
            found = self.judge.ask(named, label=f"{suite}: patient")
        return {name: found[f"{suite}/{name}"] for name in requests}

    def write_records(self, suite: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes prompt, response and verdict of each item."""
        folder = self.output / "records"
        make_folder(folder)
        write_rows(folder / f"{suite}.jsonl", rows)

    def _use(self, model: str) -> Respondent:
        """The model, with the memory of the one before let go of."""
        respondent = self.models[model]
        if self._used is not None and self._used is not respondent:
            self._used.release()
        self._used = respondent
        return respondent

    def _path(self, folder: str, model: str) -> pathlib.Path:
        settings = str(sorted(self.models[model].settings().items()))
        name = _NAME_CHARACTERS.sub("-", self.source(model)).strip("-.")[-60:]
        return self.output / folder / f"{name}-{sha256(settings)[:8]}.jsonl"

    def _note(self, suite: str, what: str, count: int, cost: Cost | None) -> None:
        self._plan[suite, what] += count
        if cost is not None:
            self._costs.setdefault(what, []).append(cost)

    def _assumed(self, name: str, *, short: bool = False) -> ChatReply:
        """A text as long as a response may be, unlike all others."""
        draw = random.Random(hashlib.sha256(name.encode()).digest())
        length = 40 if short else round(self._max_new_tokens * _CHARACTERS_PER_TOKEN)
        return ChatReply("".join(chr(draw.randrange(0x4E00, 0x9FA0)) for _ in range(length)))

    def plan_lines(self) -> list[str]:
        """Returns the lines of a dry run: counts by suite, then the cost of what is paid for."""
        lines = [f"{suite}: {count} {what}" for (suite, what), count in self._plan.items()]
        for what, costs in self._costs.items():
            known = [one.cost for one in costs if one.cost is not None]
            total = Cost(
                requests=sum(one.requests for one in costs),
                input_tokens=sum(one.input_tokens for one in costs),
                max_output_tokens=sum(one.max_output_tokens for one in costs),
                cost=math.fsum(known) if len(known) == len(costs) else None,
                currency=costs[0].currency,
            )
            lines.append(f"{what}: {total}")
        return lines


def judged_text(reply: ChatReply) -> str:
    """The response without its thoughts; empty where there is none."""
    return final_part(reply.text).strip() if reply.text is not None else ""


def failures(replies: Mapping[str, ChatReply]) -> dict[str, Any]:
    """The number of responses that are missing or empty, and why."""
    missing = {name: one.failure or "failed" for name, one in replies.items() if one.text is None}
    empty = [n for n, one in replies.items() if one.text is not None and not judged_text(one)]
    cut = [name for name, one in replies.items() if one.finish_reason == "length"]
    return {
        "num": len(replies),
        "num_missing": len(missing),
        "missing": missing,
        "num_empty": len(empty),
        "empty": empty,
        "num_cut_at_limit": len(cut),
    }
