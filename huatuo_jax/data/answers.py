"""Sampled answers: the token ids and finish reason that an answers file holds beside each text.

A text alone does not determine the tokens that a model sampled, nor whether the answer ended. One
rule holds wherever an answer becomes tokens (the reward model's training data and its
normalization, DPO, scoring, evaluation), and it is PPO's:

- If the sampled ids are known and belong to the tokenizer and template in use, they are the
  answer, and nothing is tokenised again.
- Otherwise the text is rendered in the template. An answer that was cut off (`finish_reason` is
  `length`) gets no end of turn; every other text gets one.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from huatuo_jax.data.chat.template import ChatTemplate
from huatuo_jax.data.records import Messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CUT_OFF = "length"
"""The finish reason of an answer that reached its length limit."""

_FINISH_REASONS = ("stop", CUT_OFF)


@dataclasses.dataclass(frozen=True)
class Sampled:
    """An answer's sampled token ids and its finish reason.

    Attributes:
        token_ids: of the answer, with the token that ended it; None if only its text is known.
        finish_reason: `stop` or `length`; None if it is not known.
    """

    token_ids: tuple[int, ...] | None = None
    finish_reason: str | None = None

    def __post_init__(self) -> None:
        """Validates the finish reason and the ids."""
        if self.finish_reason not in (None, *_FINISH_REASONS):
            raise ValueError(
                f"finish_reason is {self.finish_reason!r}; it should be one of {_FINISH_REASONS}"
            )
        if self.token_ids is not None and not self.token_ids:
            raise ValueError("token_ids is empty; an answer has at least the token that ended it")

    @property
    def ended(self) -> bool:
        """False for an answer that was cut off; texts of unknown origin count as ended."""
        return self.finish_reason != CUT_OFF

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any], *, prefix: str = "") -> "Sampled":
        """Reads `{prefix}token_ids` and `{prefix}finish_reason`, either of which may be missing.

        Raises:
            ValueError: a field has another type or value.
        """
        names = (f"{prefix}token_ids", f"{prefix}finish_reason")
        ids, reason = (fields[name] if name in fields else None for name in names)
        return cls(None if ids is None else token_ids_of(ids, name=names[0]), reason)

    def to_fields(self, *, prefix: str = "") -> dict[str, Any]:
        """Returns the fields that `from_fields` reads."""
        ids = None if self.token_ids is None else list(self.token_ids)
        found = {f"{prefix}token_ids": ids, f"{prefix}finish_reason": self.finish_reason}
        return {name: value for name, value in found.items() if value is not None}


class SampledPrompt(NamedTuple):
    """The prompt of sampled answers as the model saw it.

    Attributes:
        token_ids: of the prompt.
        messages_dropped: number of oldest messages that were left out so that it fits.
    """

    token_ids: tuple[int, ...]
    messages_dropped: int = 0

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> "SampledPrompt | None":
        """Reads `prompt_token_ids` and `messages_dropped`; None without the first.

        Raises:
            ValueError: a field has another type or value.
        """
        if "prompt_token_ids" not in fields or fields["prompt_token_ids"] is None:
            return None
        dropped = fields["messages_dropped"] if "messages_dropped" in fields else 0
        if not isinstance(dropped, int) or isinstance(dropped, bool) or dropped < 0 or dropped % 2:
            raise ValueError(f"messages_dropped is {dropped!r}; it should be an even number")
        return cls(token_ids_of(fields["prompt_token_ids"], name="prompt_token_ids"), dropped)


class AnswerToTokenize(NamedTuple):
    """One answer to a prompt: its messages, and its sampled ids if they are known."""

    messages: Messages
    sampled: Sampled = Sampled()


def token_ids_of(value: object, *, name: str) -> tuple[int, ...]:
    """Returns a list of token ids as a tuple; ValueError for any other value."""
    if not isinstance(value, Sequence) or not all(
        isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in value
    ):
        raise ValueError(f"{name} should be a list of token ids, whole numbers from 0 on")
    return tuple(value)


def without_oldest(messages: Messages, number: int) -> Messages:
    """Returns a prompt without a number of its oldest messages after the system text."""
    num_system = int(bool(messages) and messages[0].role == "system")
    return (*messages[:num_system], *messages[num_system + number :])


def sampled_for(
    prompt: Messages,
    sampled_prompt: SampledPrompt | None,
    template: ChatTemplate,
    tokenizer: "PreTrainedTokenizerBase",
) -> bool:
    """Returns whether ids sampled after this prompt belong to this tokenizer and template.

    They do if the prompt, without the dropped messages, renders to the ids that the model saw.
    """
    if sampled_prompt is None:
        return False
    try:
        shown = without_oldest(prompt, sampled_prompt.messages_dropped)
        return tuple(template.prompt(shown, tokenizer)) == sampled_prompt.token_ids
    except ValueError:  # The template does not render it: the ids belong to another one.
        return False


def text_of(tokenizer: "PreTrainedTokenizerBase", token_ids: Sequence[int]) -> str:
    """Returns the text of an answer's ids, special tokens left out."""
    text = tokenizer.decode(
        list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    assert isinstance(text, str)
    return text


def says(
    answer: AnswerToTokenize, template: ChatTemplate, tokenizer: "PreTrainedTokenizerBase"
) -> bool:
    """Returns whether an answer's sampled ids decode to its text.

    They do not if the text was edited since, or if a stop string ended the answer, whose ids
    continue after the text.
    """
    ids, ended = answer.sampled.token_ids, answer.sampled.ended
    if ids is None or len(answer.messages) != 1 or max(ids) >= len(tokenizer):
        return False
    # The token that ended it is not part of the text, even if it is not special in the tokenizer.
    for part in (ids[:-1], ids) if ended else (ids,):
        text = text_of(tokenizer, part)
        if template.content_of(text, tokenizer, ended=ended) == answer.messages[0].content:
            return True
    return False
