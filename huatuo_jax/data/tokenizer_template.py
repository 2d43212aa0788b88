"""The tokenizer's own chat template: a Jinja program, rendered turn by turn.

Nothing is known of the program but what it prints. So each answer is located by rendering the
dialogue up to its question with the generation prompt, and up to its end: what the second has more
is the answer. Where one rendering is not the start of the next, what a model is trained on is not
what it would see when it generates, and the dialogue is refused (programs that strip the thinking
of earlier answers do this, or that open a thinking block for the next one only).

The whole text is tokenised as `apply_chat_template` does; where a token would straddle the start
of an answer, the text is tokenised apart there, as in `chat_pieces`. Special tokens spelled in the
dialogue are cut before the program runs, so that they stay text.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import jinja2

from huatuo_jax.data.chat import ChatTemplate, TurnTokens, check_dialogue
from huatuo_jax.data.chat_jinja import literal
from huatuo_jax.data.chat_pieces import cut_apart, encode_after, special_strings
from huatuo_jax.data.records import Message, Role

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GENERATION_BLOCK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_PRIVATE_USE = [chr(code) for code in range(0xE000, 0xF900)]


class _Answer(NamedTuple):
    """The text up to an answer and up to its end, and where `generation` blocks lie in it.

    `blocks` is None where the program has no such blocks.
    """

    before: str
    after: str
    blocks: list[tuple[int, int]] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerTemplate(ChatTemplate):
    """The chat template a tokenizer brings, with the loss mask by construction.

    Trained is each answer up to its last special token, the end of turn; where the program marks
    what the assistant generates (`{% generation %}`), that and the end of turn. `variables` are
    handed to the program: one that prints today's date needs a fixed one, such as
    `{"date_string": "26 Jul 2024"}`, and is refused without. The patient's turns here hold all
    that stands before the answer, the doctor's header included.
    """

    name: ClassVar[str] = "tokenizer"
    variables: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def tokenize(
        self, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase
    ) -> list[TurnTokens]:
        """Tokenises a valid dialogue, growing it by one text after another."""
        messages = self._with_system(messages)
        self._check_system(messages, tokenizer)
        specials = special_strings(tokenizer)
        cut = _unused_character(messages)
        messages = [
            message._replace(content=cut.join(cut_apart(message.content, specials)))
            for message in messages
        ]
        growing = _GrowingText(tokenizer, cut)
        turns = []
        for number, message in enumerate(messages):
            if message.role == "user":
                before = self._jinja_text(messages[: number + 1], tokenizer, prompt=True)
                turns.append(_untrained("user", growing.extend(before)))
            elif message.role == "assistant":
                answer = self._answer(messages[: number + 1], before, tokenizer)
                turns.append(_answer_tokens(answer, growing, tokenizer))
        if messages[-1].role == "user":
            turns.append(_untrained("assistant", []))
        return turns

    def text(self, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> str:
        """The text of the ids: the training text where the doctor speaks last, else the prompt."""
        check_dialogue(messages, last=None)
        messages = self._with_system(messages)
        return self._jinja_text(messages, tokenizer, prompt=messages[-1].role == "user")

    def stop_token_ids(self, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
        """The end of a turn, as a small dialogue shows it, and EOS where that is another token."""
        rendered = self.render([Message("user", "a"), Message("assistant", "b")], tokenizer)
        last = max(index for index, trained in enumerate(rendered.trained_mask) if trained)
        end_ids = [rendered.token_ids[last], tokenizer.eos_token_id]
        return tuple(dict.fromkeys(end_id for end_id in end_ids if end_id is not None))

    def to_jinja(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """The tokenizer's template, with this object's variables and system text set in it."""
        settings = [
            f"{{%- set {name} = {literal(text)} -%}}" for name, text in self.variables.items()
        ]
        if self.default_system is not None:
            system = f"[{{'role': 'system', 'content': {literal(self.default_system)}}}]"
            settings.append(
                "{%- if messages[0]['role'] != 'system' -%}"
                f"{{%- set messages = {system} + messages -%}}"
                "{%- endif -%}"
            )
        return "".join(settings) + _jinja_source(tokenizer)

    def _with_system(self, messages: Sequence[Message]) -> list[Message]:
        if self.default_system is None or messages[0].role == "system":
            return list(messages)
        return [Message("system", self.default_system), *messages]

    def _check_system(
        self, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Raises ValueError if a system text is there and changes nothing in the rendering."""
        if messages[0].role != "system":
            return
        opening = list(messages[:2])
        other = [opening[0]._replace(content=opening[0].content + "x"), opening[1]]
        if self._jinja_text(opening, tokenizer, prompt=True) == self._jinja_text(
            other, tokenizer, prompt=True
        ):
            raise ValueError(
                "messages[0].role: 'system', but the tokenizer's chat template leaves system "
                "messages out; drop the message or choose another template"
            )

    def _answer(
        self, messages: Sequence[Message], before: str, tokenizer: PreTrainedTokenizerBase
    ) -> _Answer:
        after = self._jinja_text(messages, tokenizer, prompt=False)
        if _GENERATION_BLOCK.search(_jinja_source(tokenizer)) is None:
            return _Answer(before, after, None)
        return _Answer(before, after, self._generation_blocks(messages, tokenizer))

    def _jinja_text(
        self, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, prompt: bool
    ) -> str:
        source = _jinja_source(tokenizer)
        try:
            text = tokenizer.apply_chat_template(
                _role_and_content(messages),
                tokenize=False,
                add_generation_prompt=prompt,
                # A text in the function's place: a program that asks for the date fails on it.
                **{"strftime_now": "no date", **self.variables},
            )
        except (jinja2.TemplateError, TypeError) as problem:
            hint = ""
            if "strftime_now" in source and isinstance(problem, TypeError):
                hint = (
                    "; it seems to print today's date, which training must not depend on: give "
                    "the program a fixed one in `variables`"
                )
            raise ValueError(
                f"messages: the tokenizer's chat template fails on them: {problem}{hint}"
            ) from problem
        return str(text)

    def _generation_blocks(
        self, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase
    ) -> list[tuple[int, int]]:
        """Where the program's `generation` blocks lie in the text, in characters."""
        from transformers.utils.chat_template_utils import render_jinja_template

        variables = {**tokenizer.special_tokens_map, "strftime_now": "no date", **self.variables}
        _, blocks = render_jinja_template(
            conversations=[_role_and_content(messages)],
            chat_template=_jinja_source(tokenizer),
            return_assistant_tokens_mask=True,
            **variables,
        )
        return [(start, end) for start, end in blocks[0]]


class _GrowingText:
    """The ids of a text that grows at its end; ids that were given out never change."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, cut: str) -> None:
        self._tokenizer = tokenizer
        self._cut = cut
        # What stands before a text's later parts; any special token will do.
        self._inner_anchor = min(special_strings(tokenizer), default=None)
        self._text = ""
        self._token_ids: list[int] = []

    def extend(self, text: str) -> list[int]:
        """The ids that a longer text adds; ValueError if the text before is not its start."""
        if not text.startswith(self._text):
            raise ValueError(
                "messages: the tokenizer's chat template renders earlier turns of this dialogue "
                "otherwise when later ones follow, or a prompt otherwise than the training text, "
                "so a model would not generate from what it was trained on; choose another template"
            )
        whole = self._encode(text, anchor=None)
        border = len(self._token_ids)
        if whole[:border] == self._token_ids:
            added = whole[border:]
        else:
            added = self._encode(text[len(self._text) :], anchor=self._inner_anchor)
        self._text = text
        self._token_ids = self._token_ids + added
        return added

    def _encode(self, text: str, *, anchor: str | None) -> list[int]:
        token_ids: list[int] = []
        for chunk in text.split(self._cut):
            token_ids += encode_after(self._tokenizer, anchor, chunk)
            anchor = self._inner_anchor
        return token_ids


def _answer_tokens(
    answer: _Answer, growing: _GrowingText, tokenizer: PreTrainedTokenizerBase
) -> TurnTokens:
    """Tokenises an answer part by part and marks what is trained of it."""
    token_ids: list[int] = []
    trained_mask: list[bool] = []
    for end, trained in _parts(answer):
        part_ids = growing.extend(answer.after[:end])
        token_ids += part_ids
        trained_mask += [trained] * len(part_ids)
    special_ids = set(tokenizer.convert_tokens_to_ids(sorted(special_strings(tokenizer))))
    ends = [index for index, token_id in enumerate(token_ids) if token_id in special_ids]
    if not ends:
        raise ValueError(
            "tokenizer: its chat template puts no special token after an answer, so a model "
            "trained with it would never stop; choose another template"
        )
    num_after_end = len(token_ids) - ends[-1] - 1
    trained_mask = [*trained_mask[: ends[-1]], True, *[False] * num_after_end]
    return TurnTokens("assistant", token_ids, trained_mask, 0)


def _parts(answer: _Answer) -> list[tuple[int, bool]]:
    """The parts of an answer, each as its end in the text and whether it is trained."""
    if answer.blocks is None:
        return [(len(answer.after), True)]
    parts = []
    for start, end in answer.blocks:
        if end > len(answer.before):
            parts += [(max(start, len(answer.before)), False), (end, True)]
    if not parts:
        raise ValueError(
            "messages: the tokenizer's chat template marks nothing of an answer as generated, so "
            "it would not be trained; choose another template"
        )
    return [*parts, (len(answer.after), False)]


def _role_and_content(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def _untrained(role: Role, token_ids: list[int]) -> TurnTokens:
    return TurnTokens(role, token_ids, [False] * len(token_ids), 0)


def _jinja_source(tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.chat_template is None:
        raise ValueError(
            "template: 'tokenizer' needs a tokenizer with a chat template, and this one has none; "
            "choose a template by its name"
        )
    return str(tokenizer.get_chat_template())


def _unused_character(messages: Sequence[Message]) -> str:
    """A private-use character that stands nowhere in the dialogue, to mark cuts with."""
    used = set().union(*(message.content for message in messages))
    return next(character for character in _PRIVATE_USE if character not in used)
