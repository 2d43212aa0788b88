"""Runs a kind's jobs batch by batch, checks their rows, and writes what is kept and what is not.

    FILE.jsonl                    rows that are kept
    FILE.jsonl.rejected.jsonl     candidates that are not, each with its reason
    FILE.jsonl.settings.json      what decides the rows; another run there is refused
    FILE.jsonl.replies/           every reply of the teacher
    FILE.jsonl.spending.jsonl     every call, booked before it is sent

The rows follow from the replies alone, in the order of the jobs: a run that is started again goes
through its replies and asks only for those that are missing, so that neither kills nor a server's
faults nor a budget that is raised later change the rows.
"""

import dataclasses
import json
import math
import pathlib
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from huatuo_jax.core.files import as_path, locked_file, make_folder, write_file, write_rows
from huatuo_jax.core.progress import tell
from huatuo_jax.data.records import KINDS, Dialogue, Json, is_empty
from huatuo_jax.evaluation.asking import Cost
from huatuo_jax.judge.chat import ChatReply
from huatuo_jax.synthesis.decontamination import EvaluationTexts
from huatuo_jax.synthesis.jobs import (
    Candidate,
    Job,
    Maker,
    Proposal,
    Rejected,
    Rejection,
    Request,
    Result,
    Step,
    Task,
    Verdict,
)
from huatuo_jax.synthesis.near_duplicates import NearDuplicateIndex
from huatuo_jax.synthesis.personal_data import PersonalKind, mask
from huatuo_jax.synthesis.teachers import Teacher

PersonalData = Literal["mask", "reject", "keep"]

ATTEMPTS = 3
"""Requests for one reply, where the server brings none through."""

NEAR_DUPLICATE, CONTAMINATED, PERSONAL_DATA = "near duplicate", "contaminated", "personal data"
_WRITE_EVERY_S = 60.0
_NO_BATCH = -1  # A number that no batch has, and so no replies.
_PATIENCE = 10  # Batches without a row that end a run.


@dataclass(frozen=True, kw_only=True)
class Checks:
    """The checks that rows of all kinds go through.

    Attributes:
        near_duplicate: prompts above this ROUGE-L F of characters with an earlier one are left out.
        personal_data: mask it, leave out rows that have some, or keep it. Texts of what is left
            out are masked as well, unless it is kept.
    """

    near_duplicate: float = 0.7
    personal_data: PersonalData = "mask"


@dataclass
class Outcome:
    """The outcome of a run.

    Attributes:
        rows: those kept, as they are written.
        kept: the same as they were made, personal data masked.
        rejected: candidates that were left out, by id.
        requests: that have a reply, by task and attempt; what the server failed is not counted.
        masked: pieces of personal data that were masked in kept rows, by kind.
        batches: played.
        unfinished: jobs that the teacher could not finish.
        stopped: why the teacher can go on no more; None where it can.
        ended: why there are fewer rows than wanted; None where there are enough.
        seconds: of this run.
    """

    rows: list[Json] = field(default_factory=list)
    kept: list[Candidate] = field(default_factory=list)
    rejected: dict[str, Rejection] = field(default_factory=dict)
    requests: Counter[tuple[Task, int]] = field(default_factory=Counter)
    masked: Counter[PersonalKind] = field(default_factory=Counter)
    batches: int = 0
    unfinished: int = 0
    stopped: str | None = None
    ended: str | None = None
    seconds: float = 0.0


class Runner:
    """One run."""

    def __init__(
        self,
        maker: Maker,
        teacher: Teacher,
        output: pathlib.Path,
        *,
        checks: Checks,
        known_prompts: Mapping[str, str],
        tests: EvaluationTexts,
    ) -> None:
        """Sends nothing yet.

        Args:
            maker: of the kind.
            teacher: who is asked.
            output: the file of rows.
            checks: of all rows.
            known_prompts: prompts that no row may be a near-duplicate of, such as the seeds.
            tests: texts of evaluation sets.
        """
        self._maker, self._teacher, self._output = maker, teacher, output
        self._checks, self._tests = checks, tests
        self._index = NearDuplicateIndex(known_prompts.items(), threshold=checks.near_duplicate)
        self._outcome = Outcome()

    def run(self, num_rows: int) -> Outcome:
        """Makes at least so many rows, as the last batch may have more, and writes them.

        Raises:
            ValueError: the output was made with other settings, or another process makes it.
            OSError: a file cannot be written.
        """
        self._check_output()
        settings = self._check_settings()
        with locked_file(settings):
            return self._run(num_rows)

    def _run(self, num_rows: int) -> Outcome:
        outcome, started_s = self._outcome, time.monotonic()
        written_s, idle = started_s, 0
        while len(outcome.rows) < num_rows and outcome.stopped is None:
            jobs = self._maker.batch(outcome.batches, outcome.kept)
            if not jobs:
                outcome.ended = "the source has no more rows"
                break
            before = len(outcome.rows)
            self._play(jobs)
            outcome.batches += 1
            idle = 0 if len(outcome.rows) > before else idle + 1
            if idle == _PATIENCE and outcome.stopped is None:
                outcome.ended = f"none of the last {_PATIENCE} batches had a row to keep"
                break
            tell(f"{len(outcome.rows)} rows, {len(outcome.rejected)} candidates left out")
            if time.monotonic() - written_s > _WRITE_EVERY_S:
                self._write()
                written_s = time.monotonic()
        outcome.seconds = time.monotonic() - started_s
        self._write()
        return outcome

    def _play(self, jobs: Sequence[tuple[str, Job]]) -> None:
        """Takes a batch's jobs to their ends, all by a step at a time."""
        running: dict[str, Job] = dict(jobs)
        results: dict[str, Sequence[Result]] = {}
        steps: dict[str, Step] = {}
        for name, job in jobs:
            _advance(name, job, None, steps, results)
        while steps:
            now, steps = steps, {}
            replies = self._replies(
                {
                    f"{name}/{one.step}": one
                    for name, step in now.items()
                    for one in step
                    if isinstance(one, Request)
                }
            )
            for name, step in now.items():
                values: list[Any] = []
                for number, one in enumerate(step):
                    if isinstance(one, Proposal):
                        values.append(self._judged(f"{name}-{number}", one.text))
                    elif isinstance(one, Request) and f"{name}/{one.step}" in replies:
                        values.append(replies[f"{name}/{one.step}"])
                        self._outcome.requests[one.task, one.attempt] += 1
                if len(values) == len(step):
                    _advance(name, running[name], values, steps, results)
                else:
                    self._outcome.unfinished += 1
                    running[name].close()
        self._take({name: results[name] for name, _ in jobs if name in results})

    def _replies(self, requests: Mapping[str, Request]) -> dict[str, ChatReply]:
        """The replies to requests; those that the teacher cannot answer any more are missing."""
        batch, found, left = self._outcome.batches, dict[str, ChatReply](), dict(requests)
        for attempt in range(1, ATTEMPTS + 1):
            names = {name: name if attempt == 1 else f"{name}#{attempt}" for name in left}
            asked = {names[name]: request for name, request in left.items()}
            there = self._teacher.known(batch, asked) if asked else {}
            missing = {name: asked[name] for name in asked if name not in there}
            if missing and self._outcome.stopped is None:
                try:
                    there |= self._teacher.respond(batch, missing)
                except ValueError as error:
                    self._outcome.stopped = str(error)
                    there |= self._teacher.known(batch, missing)
            found |= {name: there[names[name]] for name in left if names[name] in there}
            left = {
                name: left[name]
                for name in left
                if name in found and found[name].text is None and found[name].failure != "refused"
            }
        # A reply that did not come is not the last word while the teacher cannot be asked again.
        if self._outcome.stopped is not None:
            found = {name: found[name] for name in found if name not in left}
        return {name: found[name] for name in requests if name in found}

    def _judged(self, name: str, text: str) -> Verdict:
        """Takes a prompt that is new; says why where it is not."""
        near_test = self._tests.near(text)
        if near_test is not None:
            return Rejection(reason=CONTAMINATED, detail=str(near_test), sample=text)
        match = self._index.nearest(text)
        if match is not None:
            detail = f"ROUGE-L {match.similarity:.3f} with {match.name}"
            return Rejection(reason=NEAR_DUPLICATE, detail=detail, sample=text)
        self._index.add(name, text)
        return None

    def _take(self, results: Mapping[str, Sequence[Result]]) -> None:
        """Checks the results of a batch, and keeps or leaves out each."""
        candidates: dict[str, Candidate] = {}
        masked: dict[str, Counter[PersonalKind]] = {}
        for name, found in results.items():
            for number, one in enumerate(found):
                row_id = name if len(found) == 1 else f"{name}-{number}"
                if isinstance(one, Rejection):
                    self._leave_out(row_id, one)
                    continue
                candidate, masked[row_id] = _without_personal_data(one)
                if masked[row_id] and self._checks.personal_data == "reject":
                    told = ", ".join(f"{kind} {count}" for kind, count in masked[row_id].items())
                    self._reject(row_id, one, PERSONAL_DATA, told)
                elif self._checks.personal_data == "keep":
                    candidates[row_id], masked[row_id] = one, Counter()
                else:
                    candidates[row_id] = candidate
        bad = self._tests.contaminated(
            {
                name: (one.prompt, "\n".join(message.content for message in one.messages))
                for name, one in candidates.items()
            }
        )
        for name, one in candidates.items():
            if name in bad:
                self._reject(name, one, CONTAMINATED, f"{bad[name].check} with {bad[name].test}")
                continue
            verdict = None if one.proposed else self._judged(name, one.prompt)
            if verdict is not None:
                self._reject(name, one, verdict.reason, verdict.detail)
            elif any(is_empty(message.content) for message in one.messages):
                self._reject(name, one, "empty turn", "")
            else:
                self._outcome.rows.append(self._row(name, one))
                self._outcome.kept.append(one)
                self._outcome.masked.update(masked[name])

    def _reject(self, name: str, one: Candidate, reason: str, detail: str) -> None:
        sample = "\n".join(message.content for message in one.messages)
        rejection = Rejection(reason=reason, detail=detail, sample=sample, labels=one.labels)
        self._leave_out(name, rejection)

    def _leave_out(self, name: str, one: Rejection) -> None:
        """Records a rejection, its texts masked: who is left out is not published either."""
        if self._checks.personal_data != "keep":
            detail, sample = mask(one.detail).text, mask(one.sample).text
            one = dataclasses.replace(one, detail=detail, sample=sample)
        self._outcome.rejected[name] = one

    def _row(self, name: str, one: Candidate) -> Json:
        source = f"synthesis, {self._teacher.name}"
        if one.row is not None:
            return {"id": name, **one.row, "source": source, **one.labels, **one.extra}
        (kind,) = [kind for kind in KINDS if kind == self._maker.kind]
        return Dialogue(
            id=name,
            messages=one.messages,
            kind=kind,
            source=source,
            extra={**one.labels, **one.extra},
        ).to_json()

    def _check_output(self) -> None:
        """Raises ValueError for an output that is a folder, or a file that no synthesis wrote."""
        if self._output.is_dir():
            raise ValueError(f"output: {self._output} is a folder; name a file in it")
        if self._output.exists() and not self._settings_file.exists():
            raise ValueError(
                f"output: {self._output} is there, and no synthesis made it; choose another file"
            )
        try:
            make_folder(self._output.parent)
        except OSError as error:
            told = f"output: {self._output.parent} cannot be made a folder ({error.strerror})"
            raise ValueError(told) from error

    @property
    def _settings_file(self) -> pathlib.Path:
        return as_path(f"{self._output}.settings.json")

    def _check_settings(self) -> pathlib.Path:
        """Refuses an output of other settings, whose replies would be paid for a second time."""
        path = self._settings_file
        settings = {
            "kind": self._maker.kind,
            **self._maker.settings(),
            "teacher": self._teacher.settings(),
            "checks": dataclasses.asdict(self._checks),
            "evaluation_sets": self._tests.digest,
        }
        settings = json.loads(json.dumps(settings, ensure_ascii=False))
        if path.exists():
            there = json.loads(path.read_text(encoding="utf-8"))
            for name in sorted({*there, *settings}):
                if there.get(name) != settings.get(name):
                    raise ValueError(
                        f"{path}: {name} was {there.get(name)!r} and is {settings.get(name)!r} now;"
                        " choose another --output, as the replies there are not those to this run"
                    )
        else:
            write_file(path, json.dumps(settings, ensure_ascii=False, indent=1))
        return path

    def _write(self) -> None:
        write_rows(self._output, self._outcome.rows)
        write_rows(
            f"{self._output}.rejected.jsonl",
            (
                {"id": name, **dataclasses.asdict(one)}
                for name, one in self._outcome.rejected.items()
            ),
        )


def plan(maker: Maker, teacher: Teacher, *, num_rows: int) -> list[str]:
    """Returns what a run may send, if every candidate were kept, without sending anything.

    One batch is played with replies of usual length; where its requests differ little, all others
    take as much. Replies that are there already are not taken off.
    """
    jobs = maker.batch(0, [])
    requests: Counter[Task] = Counter()
    costs: list[Cost] = []
    results: dict[str, Sequence[Result]] = {}
    steps: dict[str, Step] = {}
    for name, job in jobs:
        _advance(name, job, None, steps, results)
        while name in steps:
            step = steps.pop(name)
            asked = {f"{name}/{one.step}": one for one in step if isinstance(one, Request)}
            requests.update(one.task for one in asked.values())
            cost = teacher.cost(_NO_BATCH, asked) if asked else None
            costs += [] if cost is None else [cost]
            values = [
                ChatReply(maker.assumed(one), "stop") if isinstance(one, Request) else None
                for one in step
            ]
            _advance(name, job, values, steps, results)
    num_kept = sum(isinstance(one, Candidate) for found in results.values() for one in found)
    if not num_kept:
        return ["the source has no rows"]
    if maker.num_candidates is not None:
        num_rows = min(num_rows, maker.num_candidates)
    batches = math.ceil(num_rows / num_kept)
    lines = [
        f"{batches} batches of {num_kept} rows: "
        + ", ".join(f"{count * batches} requests to {task}" for task, count in requests.items())
    ]
    if costs:
        known = [one.cost for one in costs if one.cost is not None]
        whole = Cost(
            requests=sum(one.requests for one in costs) * batches,
            input_tokens=sum(one.input_tokens for one in costs) * batches,
            max_output_tokens=sum(one.max_output_tokens for one in costs) * batches,
            cost=sum(known) * batches if len(known) == len(costs) else None,
            currency=costs[0].currency,
        )
        lines.append(str(whole))
    return lines


def _advance(
    name: str,
    job: Job,
    values: list[Any] | None,
    steps: dict[str, Step],
    results: dict[str, Sequence[Result]],
) -> None:
    """Sends a job what it waits for; notes its next step, or its results."""
    try:
        steps[name] = next(job) if values is None else job.send(values)
    except StopIteration as end:
        results[name] = end.value
    except Rejected as rejected:
        results[name] = [rejected.rejection]


def _without_personal_data(one: Candidate) -> tuple[Candidate, Counter[PersonalKind]]:
    """Masks all texts of a candidate; what was masked is counted in its messages."""
    counts: Counter[PersonalKind] = Counter()
    messages = []
    for message in one.messages:
        masked = mask(message.content)
        counts.update(masked.counts)
        messages.append(message._replace(content=masked.text))
    if not counts and not one.extra and one.row is None:
        return one, counts
    return (
        dataclasses.replace(
            one,
            messages=tuple(messages),
            prompt=mask(one.prompt).text,
            extra=_masked_values(one.extra),
            row=None if one.row is None else _masked_values(one.row),
        ),
        counts,
    )


def _masked_values(value: Any) -> Any:
    if isinstance(value, str):
        return mask(value).text
    if isinstance(value, list):
        return [_masked_values(item) for item in value]
    if isinstance(value, dict):
        # An id may look like a phone number, and the source is found by it.
        return {
            name: item if name.endswith("_id") else _masked_values(item)
            for name, item in value.items()
        }
    return value
