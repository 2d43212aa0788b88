"""Real instructions and conversations: doctors' terse words polished, and held to what they said.

After HuatuoGPT (arXiv 2305.15075, section 3.2). The patient's words stay as they are; only the
doctor's turns are polished, and each is compared with the original (`faithfulness`). The original
is kept beside the polished text.
"""

import json
import os
from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from huatuo_jax.data.readers import read_dialogues
from huatuo_jax.data.records import Dialogue, Message, is_empty
from huatuo_jax.judge.judgements import sha256
from huatuo_jax.synthesis import checks, templates
from huatuo_jax.synthesis.faithfulness import differences, worst
from huatuo_jax.synthesis.jobs import (
    Candidate,
    Job,
    Proposal,
    Rejected,
    Request,
    Step,
    ask_again,
    jobs_of,
    object_of,
    with_labels,
)

RealKind = Literal["real_instruction", "real_conversation"]

_SPEAKERS = {"system": "说明", "user": "患者", "assistant": "医生"}
_ENGLISH_SPEAKERS = {"system": "note", "user": "patient", "assistant": "doctor"}
_MOST_LONGER = 6.0  # Times the length of the original, beside a greeting.
_GREETING = 120  # Characters.


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Real dialogues of one kind, and how many rows of the files are of another."""

    dialogues: Sequence[Dialogue]
    left_out: Counter[str]


def read_sources(paths: Sequence[str | os.PathLike[str]], kind: RealKind) -> Sources:
    """Reads dialogues of any form that the project's readers know.

    A dialogue of one exchange is an instruction, one of more a conversation; the others are left
    out and counted.

    Raises:
        ValueError: a file cannot be read, or none of its rows is of the kind.
    """
    found: list[Dialogue] = []
    left_out: Counter[str] = Counter()
    seen: set[str] = set()
    for path in paths:
        for one in read_dialogues(path):
            answers = [m for m in one.messages if m.role == "assistant" and m.trained]
            is_single = sum(m.role == "assistant" for m in one.messages) == 1
            key = sha256(json.dumps([list(m[:2]) for m in one.messages], ensure_ascii=False))
            if is_single != (kind == "real_instruction"):
                left_out["of the other kind"] += 1
            elif not answers or any(is_empty(m.content) for m in one.messages):
                left_out["without a doctor's words"] += 1
            elif key in seen:
                left_out["there before, word for word"] += 1
            else:
                seen.add(key)
                found.append(one)
    if not found:
        raise ValueError(
            f"source: there are no dialogues for {kind} in {', '.join(map(str, paths))}"
        )
    return Sources(dialogues=found, left_out=left_out)


@dataclass(frozen=True, kw_only=True)
class PolishingMaker:
    """Makes real instructions or conversations, one of each source dialogue.

    Attributes:
        kind: of the rows.
        dialogues: in their order.
        plain: ask for the doctor's turns as such, of a model that only answers as a doctor.
        attempts: requests for one polished text, at most, where those that came were faulty.
        seed: part of the rows' ids.
        batch_size: dialogues that are taken together.
    """

    kind: RealKind
    dialogues: Sequence[Dialogue]
    plain: bool = False
    attempts: int = 3
    seed: int = 0
    batch_size: int = 64
    num_candidates: int = field(init=False)

    def __post_init__(self) -> None:
        """Sets the number of candidates."""
        object.__setattr__(self, "num_candidates", len(self.dialogues))

    def settings(self) -> dict[str, Any]:
        """Prompts and source."""
        return {
            "prompts": templates.digest("polish_answer", "polish_dialogue"),
            "source": sha256("\0".join(repr(one.messages) for one in self.dialogues))[:16],
            "plain": self.plain,
            "attempts": self.attempts,
            "seed": self.seed,
            "batch_size": self.batch_size,
        }

    def batch(self, number: int, kept: Sequence[Candidate]) -> list[tuple[str, Job]]:
        """Returns the next dialogues."""
        first = number * self.batch_size
        return jobs_of(
            self.dialogues[first : first + self.batch_size],
            lambda _, one: self._job(one),
            first=first,
            name=f"{self.kind}-{self.seed}",
        )

    def assumed(self, request: Request) -> str:
        """Returns the doctor's words with a greeting."""
        turns = [f"您好，{text}祝您早日康复。" for text in request.material["turns"]]
        if self.plain:
            return turns[0]
        found = {"answer": turns[0]} if self.kind == "real_instruction" else {"turns": turns}
        return json.dumps(found, ensure_ascii=False)

    def _job(self, one: Dialogue) -> Job:
        originals = [m.content for m in one.messages if m.role == "assistant"]
        language = checks.language("\n".join(m.content for m in one.messages)) or "zh"
        department = one.extra.get("department")
        labels = {
            "department": department if isinstance(department, str) else "unknown",
            "language": language,
            "taken from": one.source,
        }
        # The patient's words stay as they are: what is near an earlier row is not paid for.
        prompt = "\n".join(m.content for m in one.messages if m.role == "user")
        (verdict,) = yield [Proposal(text=prompt)]
        if verdict is not None:
            return [with_labels(verdict, labels)]
        try:
            polished = yield from self._polished(one, originals, language)
        except Rejected as rejected:
            return [rejected.after("\n".join(originals), labels)]
        turns = iter(polished)
        messages = tuple(
            Message(m.role, next(turns), m.trained) if m.role == "assistant" else m
            for m in one.messages
        )
        extra: dict[str, Any] = {"original": originals, "source_id": one.id}
        if isinstance(one.extra.get("diagnosis"), str):
            extra["diagnosis"] = one.extra["diagnosis"]
        return [
            Candidate(messages=messages, prompt=prompt, labels=labels, extra=extra, proposed=True)
        ]

    def _polished(
        self, one: Dialogue, originals: Sequence[str], language: str
    ) -> Generator[Step, list[Any], list[str]]:
        """Asks for the polished turns and returns them; raises Rejected where none are faithful."""

        def turn(place: int, text: str) -> str:
            _check(originals[place], text, language, place + 1)
            return text

        def turns(_: int, text: str) -> list[str]:
            found = _turns(text, len(originals), self.kind)
            return [turn(place, one) for place, one in enumerate(found)]

        if self.plain:
            return (yield from ask_again(_plain_requests(one), turn, attempts=self.attempts))
        request = self._request(one, originals, language)
        (found,) = yield from ask_again([request], turns, attempts=self.attempts)
        return found

    def _request(self, one: Dialogue, originals: Sequence[str], language: str) -> Request:
        if self.kind == "real_instruction":
            question = "\n".join(m.content for m in one.messages if m.role != "assistant")
            values = {"question": question, "answer": originals[0]}
            messages = templates.fill("polish_answer", language, values)
        else:
            names = _SPEAKERS if language == "zh" else _ENGLISH_SPEAKERS
            lines = [f"{names[m.role]}：{m.content}" for m in one.messages]
            values = {"dialogue": "\n".join(lines), "count": str(len(originals))}
            messages = templates.fill("polish_dialogue", language, values)
        material = {"turns": list(originals), "kind": self.kind}
        return Request(step="polish", task="polish", messages=messages, material=material)


def _plain_requests(one: Dialogue) -> list[Request]:
    """Returns a request for each of the doctor's turns, after what was said before it."""
    found: list[Request] = []
    for place, message in enumerate(one.messages):
        if message.role == "assistant":
            before = [{"role": m.role, "content": m.content} for m in one.messages[:place]]
            found.append(
                Request(
                    step=f"answer-{len(found)}",
                    task="answer",
                    messages=before,
                    plain=before,
                    material={"turns": [message.content]},
                )
            )
    return found


def _turns(text: str, count: int, kind: RealKind) -> list[str]:
    """Returns the polished turns of a reply."""
    found = object_of(text)
    turns = [found.get("answer")] if kind == "real_instruction" else found.get("turns")
    if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
        raise Rejected("broken JSON", "the polished text is missing", text)
    if len(turns) != count:
        raise Rejected("number of turns", f"{len(turns)} of {count} turns", text)
    return [turn.strip() for turn in turns]


def _check(original: str, polished: str, language: str, number: int) -> None:
    """Raises Rejected for a turn that does not say what its original says."""
    where = f"turn {number}: "
    if is_empty(polished):
        raise Rejected("empty reply", where, polished)
    refused = checks.refusal(polished)
    if refused is not None and refused not in original:
        raise Rejected("refusal", where + refused, polished)
    if checks.switches_language(polished, language) and not checks.switches_language(
        original, language
    ):
        raise Rejected("language", f"{where}{checks.language(polished)}", polished)
    if len(polished) > _MOST_LONGER * len(original) + _GREETING:
        raise Rejected("length", f"{where}{len(polished)} characters", polished)
    drifts = differences(original, polished)
    if drifts:
        raise Rejected("unfaithful", where + worst(drifts), polished)
