"""What an inspection measures of a record: turns, characters, tokens, and what would not fit.

Sizes have names because each family of records has its own: a dialogue has turns and trained
tokens, a comparison has two answers, an exam question has options.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from huatuo_jax.data.chat import ChatTemplate, Rendered, truncate
from huatuo_jax.data.examples import num_trained
from huatuo_jax.data.files import RowError
from huatuo_jax.data.records import Case, Comparison, Dialogue, ExamQuestion, Message, Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TURNS, CHARACTERS, TOKENS, TRAINED = "turns", "characters", "tokens", "trained tokens"


@dataclass(kw_only=True)
class Tally:
    """Sums over records; tallies of several files add up.

    Attributes:
        max_tokens: the limit that `over` goes by.
        sizes: the sizes of all records, by name.
        lengths_kept: the tokens of each dialogue once truncated, without those that are dropped.
        over: records with more than `max_tokens` tokens (either dialogue of a comparison).
        shortened, messages_dropped, dropped: dialogues that lose their oldest turns, how many
            messages those are, and dialogues whose last exchange alone is too long.
        chosen_longer: comparisons whose chosen answer has more tokens than the rejected one.
        several_answers: exam questions with more than one right option.
        refused: records that the template cannot say, with their line and the reason.
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
        """Takes in the sizes of a record; `trained_tokens` is the name `trained tokens`."""
        for name, size in sizes.items():
            self.sizes.setdefault(name.replace("_", " "), []).append(size)

    def add(self, other: "Tally") -> None:
        """Takes in all of another tally."""
        for name, sizes in other.sizes.items():
            self.sizes.setdefault(name, []).extend(sizes)
        self.lengths_kept += other.lengths_kept
        self.over += other.over
        self.shortened += other.shortened
        self.messages_dropped += other.messages_dropped
        self.dropped += other.dropped
        self.chosen_longer += other.chosen_longer
        self.several_answers += other.several_answers
        self.refused += other.refused

    @property
    def trained_share(self) -> float | None:
        """The share of all tokens that are trained; None where nothing is."""
        if TRAINED not in self.sizes:
            return None
        return sum(self.sizes[TRAINED]) / sum(self.sizes[TOKENS])

    def to_json(self) -> dict[str, Any]:
        """The counts; the sizes are for their distributions to tell."""
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
        """Takes the tally to measure into."""
        self._template = template
        self._tokenizer = tokenizer
        self._tally = tally

    def __call__(self, record: Record) -> None:
        """Measures a record.

        Raises:
            ValueError: the template cannot say it; the tally is as it was.
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
    """Where the last messages of a rendered dialogue begin, the header of the first left out."""
    return rendered.turns[-len(continuation)].content_start


def _spoken(messages: Sequence[Message]) -> tuple[int, int]:
    """The turns of patient and doctor, and the characters of all messages."""
    turns = sum(message.role != "system" for message in messages)
    return turns, sum(len(message.content) for message in messages)
