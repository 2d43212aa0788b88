"""Measures and samples of an inspection: turns, characters, tokens, and rows that would not fit.

Sizes have names because each family of records has its own: a dialogue has turns and trained
tokens, a preference pair has two answers, an exam question has options.

A sample is a record as a model sees it, cut into segments: the turn's role, trained or not, special
or text. A segment keeps its text exactly; `huatuo_jax.data.inspection_report` formats it.
"""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from huatuo_jax.data.chat.template import ChatTemplate, Rendered, special_strings, truncate
from huatuo_jax.data.files import RowError
from huatuo_jax.data.records import (
    Case,
    Comparison,
    Dialogue,
    ExamQuestion,
    Message,
    Prompt,
    Record,
)
from huatuo_jax.data.tokenizing import num_trained

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TURNS, CHARACTERS, TOKENS, TRAINED = "turns", "characters", "tokens", "trained tokens"


@dataclass(kw_only=True)
class Tally:
    """Sums over records; tallies of several files add up.

    Attributes:
        max_tokens: the limit for `over`.
        sizes: the sizes of all records, by name.
        lengths_kept: the tokens of each dialogue once truncated, without those that are dropped.
        over: records with more than `max_tokens` tokens (either dialogue of a pair).
        shortened, messages_dropped, dropped: dialogues that lose their oldest turns, the number of
            these messages, and dialogues whose last exchange alone is too long.
        chosen_longer: pairs whose chosen answer has more tokens than the rejected one.
        several_answers: exam questions with more than one right option.
        refused: records that the template does not render, with their line and the reason.
    """

    max_tokens: int
    sizes: dict[str, list[int]] = field(default_factory=dict)
    lengths_kept: list[int] = field(default_factory=list)
    over: int = 0
    shortened: int = 0
    messages_dropped: int = 0
    dropped: int = 0
    chosen_longer: int = 0
    several_answers: int = 0
    refused: list[RowError] = field(default_factory=list)

    def measured(self, **sizes: int) -> None:
        """Adds the sizes of a record; `trained_tokens` is the name `trained tokens`."""
        for name, size in sizes.items():
            self.sizes.setdefault(name.replace("_", " "), []).append(size)

    def add(self, other: "Tally") -> None:
        """Adds another tally."""
        for name, sizes in other.sizes.items():
            self.sizes.setdefault(name, []).extend(sizes)
        for one in fields(self):
            if one.name not in ("max_tokens", "sizes"):
                setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))

    @property
    def trained_share(self) -> float | None:
        """The share of all tokens that are trained; None if none is."""
        if TRAINED not in self.sizes:
            return None
        return sum(self.sizes[TRAINED]) / sum(self.sizes[TOKENS])

    def to_json(self) -> dict[str, Any]:
        """Returns the counts; the sizes are in the distributions."""
        return {
            "max_tokens": self.max_tokens,
            "total_tokens": sum(self.sizes[TOKENS]) if TOKENS in self.sizes else None,
            "trained_share": self.trained_share,
            "over": self.over,
            "shortened": self.shortened,
            "messages_dropped": self.messages_dropped,
            "dropped": self.dropped,
            "chosen_longer": self.chosen_longer,
            "several_answers": self.several_answers,
            "refused": [str(error) for error in self.refused],
        }


class Measurer:
    """Measures records, one by one, into a tally."""

    def __init__(
        self, template: ChatTemplate, tokenizer: "PreTrainedTokenizerBase", tally: Tally
    ) -> None:
        """Keeps the tally to measure into."""
        self._template = template
        self._tokenizer = tokenizer
        self._tally = tally

    def __call__(self, record: Record) -> None:
        """Measures a record.

        Raises:
            ValueError: the template does not render it; the tally is unchanged.
        """
        if isinstance(record, Dialogue):
            self._dialogue(record)
        elif isinstance(record, Comparison):
            self._comparison(record)
        elif isinstance(record, Case):
            self._case(record)
        elif isinstance(record, ExamQuestion):
            self._exam(record)
        else:
            num_tokens = len(self._template.prompt(record.messages, self._tokenizer))
            turns, characters = _spoken(record.messages)
            self._tally.measured(turns=turns, characters=characters, tokens=num_tokens)
            self._tally.over += num_tokens > self._tally.max_tokens

    def _dialogue(self, dialogue: Dialogue) -> None:
        tally = self._tally
        rendered = self._template.render(dialogue.messages, self._tokenizer)
        turns, characters = _spoken(dialogue.messages)
        tally.measured(
            turns=turns,
            characters=characters,
            tokens=len(rendered.token_ids),
            trained_tokens=num_trained(np.asarray(rendered.trained_mask)),
        )
        if len(rendered.token_ids) <= tally.max_tokens:
            tally.lengths_kept.append(len(rendered.token_ids))
            return
        tally.over += 1
        shorter, num_dropped = truncate(
            self._template,
            dialogue.messages,
            self._tokenizer,
            max_tokens=tally.max_tokens,
            policy="drop_oldest_turns",
        )
        if shorter is None:
            tally.dropped += 1
            return
        tally.shortened += 1
        tally.messages_dropped += num_dropped
        tally.lengths_kept.append(len(shorter.token_ids))

    def _comparison(self, comparison: Comparison) -> None:
        chosen = self._template.render(comparison.chosen_dialogue, self._tokenizer)
        rejected = self._template.render(comparison.rejected_dialogue, self._tokenizer)
        chosen_tokens, rejected_tokens = len(chosen.token_ids), len(rejected.token_ids)
        self._tally.measured(
            turns_chosen=_spoken(comparison.chosen_dialogue)[0],
            turns_rejected=_spoken(comparison.rejected_dialogue)[0],
            characters_chosen=_spoken(comparison.chosen)[1],
            characters_rejected=_spoken(comparison.rejected)[1],
            tokens_prompt=continuation_start(chosen, comparison.chosen),
            tokens_with_chosen=chosen_tokens,
            tokens_with_rejected=rejected_tokens,
        )
        # The prompt is the same, so the longer dialogue has the longer answer.
        self._tally.chosen_longer += chosen_tokens > rejected_tokens
        self._tally.over += max(chosen_tokens, rejected_tokens) > self._tally.max_tokens

    def _case(self, case: Case) -> None:
        self._tally.measured(
            characters_case=len(case.medical_case),
            characters_diagnosis=len(case.doctor_diagnosis),
            tokens_case=self._num_tokens(case.medical_case),
            tokens_diagnosis=self._num_tokens(case.doctor_diagnosis),
        )

    def _exam(self, exam: ExamQuestion) -> None:
        text = "\n".join([exam.question, *exam.options.values()])
        num_tokens = self._num_tokens(text)
        self._tally.measured(options=len(exam.options), characters=len(text), tokens=num_tokens)
        self._tally.several_answers += len(exam.answer) > 1
        self._tally.over += num_tokens > self._tally.max_tokens

    def _num_tokens(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False, verbose=False))


def continuation_start(rendered: Rendered, continuation: Sequence[Message]) -> int:
    """Returns where the last messages of a rendered dialogue begin, after the first header."""
    return rendered.turns[-len(continuation)].content_start


def _spoken(messages: Sequence[Message]) -> tuple[int, int]:
    """Returns the number of user and assistant turns, and of characters in all messages."""
    turns = sum(message.role != "system" for message in messages)
    return turns, sum(len(message.content) for message in messages)


class Segment(NamedTuple):
    """A part of a sample: the turn's role or the field's name, and the kind of its tokens.

    `marked` tokens are trained (in a preference pair: compared), no text can spell `special`
    tokens.
    """

    label: str
    marked: bool
    special: bool
    text: str


@dataclass(frozen=True)
class Sample:
    """One rendering: its title, and its segments in order."""

    title: str
    segments: tuple[Segment, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns the title and the segments."""
        segments = [segment._asdict() for segment in self.segments]
        return {**asdict(self), "segments": segments}


def samples_of(
    records: Sequence[tuple[int, Record]],
    template: ChatTemplate,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    num: int,
) -> tuple[Sample, ...]:
    """Renders the first records, given with their lines, but those the template refuses."""
    samples: list[Sample] = []
    render = _SampleRenderer(template, tokenizer)
    for line, record in records[:num]:
        try:
            samples += render(f"line {line}, id {record.id}", record)
        except ValueError:  # The report lists it among the refused ones, with the reason.
            continue
    return tuple(samples)


class _SampleRenderer:
    def __init__(self, template: ChatTemplate, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._template = template
        self._tokenizer = tokenizer
        strings = special_strings(tokenizer)
        self._special_ids = set(tokenizer.convert_tokens_to_ids(sorted(strings)))
        self._anchor = tokenizer.encode("a", add_special_tokens=False)

    def __call__(self, title: str, record: Record) -> list[Sample]:
        if isinstance(record, Dialogue):
            rendered = self._template.render(record.messages, self._tokenizer)
            return [Sample(title, self._segments(rendered, rendered.trained_mask))]
        if isinstance(record, Comparison):
            return self._comparison(title, record)
        if isinstance(record, Prompt):
            return [Sample(title, self._prompt(record))]
        return [Sample(title, _plain_fields(record))]

    def _comparison(self, title: str, comparison: Comparison) -> list[Sample]:
        """Returns segments of the chosen dialogue, and of the rejected one after the prompt."""
        samples = []
        for name, dialogue, continuation in (
            ("chosen", comparison.chosen_dialogue, comparison.chosen),
            ("rejected", comparison.rejected_dialogue, comparison.rejected),
        ):
            rendered = self._template.render(dialogue, self._tokenizer)
            start = continuation_start(rendered, continuation)
            mask = [
                trained and position >= start
                for position, trained in enumerate(rendered.trained_mask)
            ]
            begin = start if name == "rejected" else 0
            segments = self._segments(rendered, mask, begin=begin)
            after = ", after the same prompt" if begin else ""
            samples.append(Sample(f"{title}: {name}{after}", segments))
        return samples

    def _prompt(self, prompt: Prompt) -> tuple[Segment, ...]:
        turns = self._template.tokenize(prompt.messages, self._tokenizer)
        token_ids = [token_id for turn in turns for token_id in turn.token_ids]
        labels = [turn.role for turn in turns for _ in turn.token_ids]
        aside = {"reference": prompt.reference, "diagnosis": prompt.diagnosis}
        return (
            *self._cut(token_ids, labels, [False] * len(token_ids)),
            *(Segment(name, False, False, text) for name, text in aside.items() if text),
        )

    def _segments(
        self, rendered: Rendered, mask: Sequence[bool], *, begin: int = 0
    ) -> tuple[Segment, ...]:
        labels = [turn.role for turn in rendered.turns for _ in range(turn.start, turn.end)]
        return self._cut(rendered.token_ids[begin:], labels[begin:], mask[begin:])

    def _cut(
        self, token_ids: Sequence[int], labels: Sequence[str], mask: Sequence[bool]
    ) -> tuple[Segment, ...]:
        are_special = [token_id in self._special_ids for token_id in token_ids]
        tokens = zip(labels, mask, are_special, token_ids, strict=True)
        runs = itertools.groupby(tokens, key=lambda token: token[:3])
        return tuple(
            Segment(
                label, marked, special, self._text([token[3] for token in run], special=special)
            )
            for (label, marked, special), run in runs
        )

    def _text(self, token_ids: list[int], *, special: bool) -> str:
        if special:
            return "".join(self._tokenizer.convert_ids_to_tokens(token_ids))
        # After an anchor: some decoders remove a blank from the start of their input.
        before = self._decode(self._anchor)
        return self._decode([*self._anchor, *token_ids])[len(before) :]

    def _decode(self, token_ids: list[int]) -> str:
        text = self._tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)
        return str(text)


def _plain_fields(record: Case | ExamQuestion) -> tuple[Segment, ...]:
    """Returns the fields of a case or an exam question, which have no template."""
    if isinstance(record, Case):
        fields = {"case": record.medical_case, "diagnosis": record.doctor_diagnosis}
    else:
        fields = {"question": record.question, **record.options, "answer": record.answer}
        fields |= {"explanation": record.explanation} if record.explanation else {}
    return tuple(Segment(name, False, False, text) for name, text in fields.items())
