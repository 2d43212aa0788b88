"""From an answers file to the questions that a judge is asked."""

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from huatuo_jax.data.answers import Sampled, SampledPrompt
from huatuo_jax.data.files import RowError, read_rows
from huatuo_jax.data.records import Prompt, answer, same_answer
from huatuo_jax.feedback.judgements import (
    Judgement,
    Protocol,
    prompt_hash,
    question_key,
    sha256,
)
from huatuo_jax.feedback.judges import Judge, JudgementFailed, Reply


@dataclass(frozen=True)
class Answered:
    """A prompt and the texts of its answers, in the order of the file.

    Attributes:
        prompt: with its extra fields.
        answers: their texts.
        sampled: how each was sampled; nothing where the file has texts alone.
        sampled_prompt: what the model was given.
    """

    prompt: Prompt
    answers: tuple[str, ...]
    sampled: tuple[Sampled, ...] = ()
    sampled_prompt: SampledPrompt | None = None

    def sampled_fields(self, index: int, *, prefix: str) -> dict[str, Any]:
        """How an answer was sampled, as fields of a record of several answers."""
        return self.sampled[index].to_fields(prefix=prefix) if self.sampled else {}


@dataclass(frozen=True, kw_only=True)
class Question:
    """One thing to ask a judge.

    Attributes:
        prompt: with its reference.
        protocol: "score" for one answer, "pairwise" for two.
        answers: which of the prompt's answers, in the order shown.
        texts: of those answers.
        key: hash of all that is asked; equal questions have equal keys.
        judge: the judge's name.
        template: hash of the judge's template.
    """

    prompt: Prompt
    protocol: Protocol
    answers: tuple[int, ...]
    texts: tuple[str, ...]
    key: str
    judge: str
    template: str

    @property
    def identity(self) -> tuple[str, str, tuple[int, ...]]:
        """As `Judgement.identity`."""
        return self.key, self.prompt.id, self.answers

    async def ask(self, judge: Judge) -> Reply:
        """The judge's reply; raises as `judges.Judge` does."""
        if self.protocol == "score":
            return await judge.score(self.prompt, self.texts[0])
        return await judge.compare(self.prompt, self.texts[0], self.texts[1])

    def judgement(self, outcome: Reply | JudgementFailed, *, paid: bool) -> Judgement:
        """The record of what the judge said, or of why it said nothing.

        Args:
            outcome: of `ask`.
            paid: this record carries tokens and cost; False for a copy of an equal question's.
        """
        shown = dict(zip(_index_names(self.protocol), self.answers, strict=True))
        return Judgement(
            id=self.prompt.id,
            key=self.key,
            protocol=self.protocol,
            answer=shown.get("answer"),
            first=shown.get("first"),
            second=shown.get("second"),
            scores=outcome.scores if isinstance(outcome, Reply) else None,
            p_first=outcome.p_first if isinstance(outcome, Reply) else None,
            judge=self.judge,
            template=self.template,
            reason=outcome.reason if isinstance(outcome, Reply) else None,
            raw=outcome.raw,
            usage=outcome.usage if paid else None,
            cost=outcome.cost if paid else 0.0,
            latency_s=outcome.latency_s,
            error=str(outcome) if isinstance(outcome, JudgementFailed) else None,
            failure=outcome.failure if isinstance(outcome, JudgementFailed) else None,
            max_tokens=outcome.max_tokens if isinstance(outcome, JudgementFailed) else None,
            prompt_sha256=prompt_hash(self.prompt),
            answer_sha256=tuple(map(sha256, self.texts)),
        )

    def copy_of(self, judgement: Judgement) -> Judgement:
        """The record of a verdict that an equal question has got already."""
        reply = Reply(
            scores=judgement.scores,
            p_first=judgement.p_first,
            reason=judgement.reason,
            raw=judgement.raw,
            latency_s=judgement.latency_s,
        )
        return self.judgement(reply, paid=False)


def read_answered(path: str | os.PathLike[str], *, encoding: str | None = None) -> list[Answered]:
    """The records of an answers file.

    Raises:
        ValueError: there is no such file, or a row that is no answers record or has an id that
            stood before.
    """
    found: dict[str, Answered] = {}
    for row in read_rows(path, encoding=encoding):
        if isinstance(row, RowError):
            raise ValueError(str(row))
        try:
            answered = _answered(row.value)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{row.file}:{row.line}: not an answers record: {error}") from error
        if answered.prompt.id in found:
            raise ValueError(f"{row.file}:{row.line}: id {answered.prompt.id!r} stood before")
        found[answered.prompt.id] = answered
    if not found:
        raise ValueError(f"{path}: holds no answers")
    return list(found.values())


def score_questions(answered: Iterable[Answered], judge: Judge) -> Iterator[Question]:
    """Every answer of every prompt, each by itself, so that no score depends on its neighbours."""
    for item in answered:
        for index in range(len(item.answers)):
            yield _question(item, "score", (index,), judge)


def differ(text: str, other: str) -> bool:
    """Whether two texts are worth a question; empty ones are all the same."""
    return not same_answer(answer(text), answer(other))


def pairwise_questions(
    answered: Iterable[Answered], judge: Judge, *, max_pairs: int | None = None
) -> Iterator[Question]:
    """Every two different answers of a prompt, in both orders; empty ones are all the same.

    Args:
        answered: prompts and answers.
        judge: who is asked.
        max_pairs: of a prompt at most; they are chosen by the answers' texts, so that the choice
            does not depend on the order in the file.
    """
    for item in answered:
        pairs = [
            pair
            for pair in itertools.combinations(range(len(item.answers)), 2)
            if differ(*(item.answers[index] for index in pair))
        ]
        if max_pairs is not None and len(pairs) > max_pairs:
            pairs = sorted(sorted(pairs, key=lambda pair: _lot(item, pair))[:max_pairs])
        for first, second in pairs:
            yield _question(item, "pairwise", (first, second), judge)
            yield _question(item, "pairwise", (second, first), judge)


def _answered(row: object) -> Answered:
    if not isinstance(row, dict) or not isinstance(row.get("answers"), list):
        raise ValueError("it should be an object with a list of answers")
    prompt = Prompt.from_json({**row, "source": row["source"] if "source" in row else ""})
    for name in ("id", "reference", "diagnosis"):
        value = getattr(prompt, name)
        if not isinstance(value, str) and not (value is None and name != "id"):
            raise ValueError(f"{name} is {value!r}; it should be text")
    return Answered(
        prompt,
        tuple(map(_text, row["answers"])),
        tuple(map(Sampled.from_fields, row["answers"])),
        SampledPrompt.from_fields(row),
    )


def _text(item: object) -> str:
    text = item["text"] if isinstance(item, dict) and "text" in item else None
    if not isinstance(text, str):
        raise ValueError('each of its answers should be an object with a text, {"text": "..."}')
    return text


def _question(
    item: Answered, protocol: Protocol, answers: tuple[int, ...], judge: Judge
) -> Question:
    texts = tuple(item.answers[index] for index in answers)
    template = judge.template_hash(protocol)
    return Question(
        prompt=item.prompt,
        protocol=protocol,
        answers=answers,
        texts=texts,
        key=question_key(
            settings=judge.settings,
            protocol=protocol,
            template=template,
            prompt=item.prompt,
            texts=texts,
        ),
        judge=judge.name,
        template=template,
    )


def _lot(item: Answered, pair: Sequence[int]) -> str:
    texts = sorted(item.answers[index] for index in pair)
    return sha256("\0".join([prompt_hash(item.prompt), *texts]))


def _index_names(protocol: Protocol) -> tuple[str, ...]:
    return ("answer",) if protocol == "score" else ("first", "second")
