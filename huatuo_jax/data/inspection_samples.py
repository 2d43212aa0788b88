"""Records as a model sees them, cut into segments: whose turn, trained or not, special or text.

A segment keeps its text exactly; how it is shown is `inspection_report`'s affair.
"""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from huatuo_jax.data.chat import ChatTemplate, Rendered
from huatuo_jax.data.chat_pieces import special_strings
from huatuo_jax.data.inspection_measures import continuation_start
from huatuo_jax.data.records import Case, Comparison, Dialogue, ExamQuestion, Prompt, Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Segment(NamedTuple):
    """A stretch of a sample: the turn's role or the field's name, and what its tokens are.

    `marked` are the tokens that are trained (in a comparison: those that are compared), `special`
    the tokens that no text can spell.
    """

    label: str
    marked: bool
    special: bool
    text: str


@dataclass(frozen=True)
class Sample:
    """One rendering: a title that says which, and its segments in order."""

    title: str
    segments: tuple[Segment, ...]

    def to_json(self) -> dict[str, Any]:
        """The title and the segments."""
        segments = [segment._asdict() for segment in self.segments]
        return {**asdict(self), "segments": segments}


def samples_of(
    records: Sequence[tuple[int, Record]],
    template: ChatTemplate,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    num: int,
) -> tuple[Sample, ...]:
    """Samples of the first records, given with their lines; one the template refuses has none."""
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
        """The chosen dialogue, and of the rejected one what stands behind the same prompt."""
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
            behind = ", behind the same prompt" if begin else ""
            samples.append(Sample(f"{title}: {name}{behind}", segments))
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
        # Behind an anchor: some decoders take a blank off the start of what they are given.
        before = self._decode(self._anchor)
        return self._decode([*self._anchor, *token_ids])[len(before) :]

    def _decode(self, token_ids: list[int]) -> str:
        text = self._tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)
        return str(text)


def _plain_fields(record: Case | ExamQuestion) -> tuple[Segment, ...]:
    """Cases and exam questions as they stand: no template is theirs."""
    if isinstance(record, Case):
        fields = {"case": record.medical_case, "diagnosis": record.doctor_diagnosis}
    else:
        fields = {"question": record.question, **record.options, "answer": record.answer}
        fields |= {"explanation": record.explanation} if record.explanation else {}
    return tuple(Segment(name, False, False, text) for name, text in fields.items())
