"""The tokenizer's own chat template: a Jinja program, rendered turn by turn.

Nothing is known of the program but its output. So each answer is located by rendering the
dialogue up to its question with the generation prompt, and up to its end: the answer is the second
text without the first. Where one rendering is not the start of the next, the model would generate
from another text than it was trained on, and the dialogue is refused (programs that strip the
thinking of earlier answers do this, or that open a thinking block for the next one only).

The whole text is tokenised as `apply_chat_template` does; where a token would straddle the start
of an answer, the text is tokenised apart there, as in `huatuo_jax.data.chat.template`. Special
tokens spelled in the dialogue are cut before the program runs, so that they stay text.

A program that asks for today's date (`strftime_now`) gets one fixed date: the rendered source is
the exported one, with a definition of that function before it.

The Jinja sources of exported tokenizers are made and recognized here too (`jinja_source`,
`exported_source`).
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import jinja2

from huatuo_jax.data.chat.template import (
    ChatTemplate,
    TurnTokens,
    check_dialogue,
    cut_apart,
    encode_after,
    special_strings,
    without_start_of,
)
from huatuo_jax.data.records import Message, Role

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBES = (
    (Message("user", "头痛三天了。"), Message("assistant", "“多喝水”，休息。\n\n再来复查。")),
    (
        Message("user", " How long, 2 days? "),
        Message("assistant", "Rest.\n1. Water"),
        Message("user", "（好的）"),
        Message("assistant", "再见！"),
    ),
)
_OTHER_TOKENS = (
    "{#- This gives the text of training. Its tokens differ where they reach over the border of two"
    " parts of a dialogue, which training tokenises each by itself. -#}"
)
_DEFAULT_SYSTEM = re.compile(
    r'^\{%- set system = (none|".*") -%\}\{%- set turns = messages -%\}$', re.MULTILINE
)
_GENERATION_BLOCK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_DEFAULT_DATE = datetime.date(2024, 7, 26)
_OWN_DATE = re.compile(r"""["'](\d{1,2} [A-Z][a-z]{2} \d{4})["']""")  # Llama's way to write one.
_OWN_FORMAT = "%d %b %Y"
_FIXED_DATE = re.compile(r"\{#- Dates are those of (\d{4}-\d{2}-\d{2})\. -#\}")
_DIRECTIVES = "aAwdbBmyYHIpMSfjUWcxX"
_PRIVATE_USE = [chr(code) for code in range(0xE000, 0xF900)]


def unread_tokens(template: ChatTemplate, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Returns the template's control tokens that the tokenizer would read as plain text.

    In an exported tokenizer, whose template is a text, they have to be special tokens. Baichuan
    marks its turns with such tokens. Tokens of one character are left out, as texts hold them too.
    """
    special = special_strings(tokenizer)
    controls = template.control_tokens(tokenizer)
    return tuple(text for text in controls if len(text) > 1 and text not in special)


def exported_source(template: ChatTemplate, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Returns a template in Jinja for a tokenizer's files; None if they hold it already.

    If tokenising its whole text does not give the tokens of training, a comment notes it.

    Args:
        template: of training.
        tokenizer: as it will be exported.
    """
    source = template.to_jinja(tokenizer)
    if is_held(source, tokenizer):
        return None
    return source if gives_the_tokens(template, tokenizer) else _OTHER_TOKENS + source


def is_held(source: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Returns whether a tokenizer's chat template is this source, as `exported_source` gives it."""
    own = own_source(tokenizer)
    return own is not None and own.removeprefix(_OTHER_TOKENS) == source


def own_source(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Returns the one chat template of a tokenizer; None if it has none or several."""
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default") if len(own) == 1 else None
    return own if isinstance(own, str) else None


def default_system_in(source: str) -> tuple[str | None] | None:
    """Returns the default system text of a source that `jinja_source` made, as a tuple of one.

    None for any other source.
    """
    found = _DEFAULT_SYSTEM.search(source)
    if found is None:
        return None
    return (None,) if found[1] == literal(None) else (str(json.loads(found[1])),)


def gives_the_tokens_of_training(source: str) -> bool:
    """Returns whether an exported source has no note that its tokens differ."""
    return not source.startswith(_OTHER_TOKENS)


def gives_the_tokens(template: ChatTemplate, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Returns whether transformers tokenises as training does, given the Jinja template."""
    source = template.to_jinja(tokenizer)
    return all(
        tokenizer.apply_chat_template(
            [message._asdict() for message in messages], chat_template=source, return_dict=False
        )
        == template.render(messages, tokenizer).token_ids
        for messages in _PROBES
    )


def literal(text: str | None) -> str:
    """Returns a string as a Jinja literal (JSON's escapes are Jinja's too), None as `none`."""
    return "none" if text is None else json.dumps(text, ensure_ascii=False)


def jinja_source(
    default_system: str | None, *, opening: str, question: str, answer: str, answer_header: str
) -> str:
    """Returns a chat template in Jinja around four Jinja expressions.

    They may use `system` (possibly none) and, in turns, `message` and `loop`.
    """
    disorder = literal("a dialogue is an optional system message, then user and assistant in turn")
    lines = (
        "{%- if messages[0]['role'] == 'system' -%}",
        "{%- set system = messages[0]['content'] -%}{%- set turns = messages[1:] -%}",
        "{%- else -%}",
        f"{{%- set system = {literal(default_system)} -%}}{{%- set turns = messages -%}}",
        "{%- endif -%}",
        f"{{{{- {opening} -}}}}",
        "{%- for message in turns -%}",
        "{%- if message['role'] == 'user' and loop.index0 % 2 == 0 -%}",
        f"{{{{- {question} -}}}}",
        "{%- elif message['role'] == 'assistant' and loop.index0 % 2 == 1 -%}",
        f"{{{{- {answer} -}}}}",
        "{%- else -%}",
        f"{{{{- raise_exception({disorder}) -}}}}",
        "{%- endif -%}",
        "{%- endfor -%}",
        "{%- if add_generation_prompt -%}",
        f"{{{{- {answer_header} -}}}}",
        "{%- endif -%}",
    )
    return "\n".join(lines)


class _Answer(NamedTuple):
    """The text up to an answer and up to its end, and the ranges of `generation` blocks.

    `blocks` is None if the program has no such blocks.
    """

    before: str
    after: str
    blocks: list[tuple[int, int]] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerTemplate(ChatTemplate):
    """The tokenizer's own chat template, with the loss mask by construction.

    Trained is each answer up to its last special token, the end of turn; if the program marks the
    generated text (`{% generation %}`), that text and the end of turn. A user turn here holds all
    text before the answer, the assistant's header included.

    `variables` are set before the program. `date` is today's date for it, as 2024-07-26; None for
    the program's own default ("26 Jul 2024" in Llama 3's), or 2024-07-26 if it has none. A program
    from a model that was trained here keeps the date of that training.
    """

    name: ClassVar[str] = "tokenizer"
    variables: Mapping[str, str] = dataclasses.field(default_factory=dict)
    date: str | None = None

    def __post_init__(self) -> None:
        """Validates the date."""
        if self.date is not None:
            try:
                datetime.date.fromisoformat(self.date)
            except ValueError as error:
                raise ValueError(
                    f"template_date={self.date!r} must be a date as {_DEFAULT_DATE.isoformat()}"
                ) from error

    def tokenize(
        self, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase
    ) -> list[TurnTokens]:
        """Tokenises a valid dialogue, growing it by one text after another."""
        messages = self._with_system(messages)
        self._check_system(messages, tokenizer)
        turns = self._grow(_GrowingText(tokenizer, messages), messages, tokenizer)
        if messages[-1].role == "user":
            turns.append(_untrained("assistant", []))
        return turns

    def _grow(
        self,
        growing: _GrowingText,
        messages: Sequence[Message],
        tokenizer: PreTrainedTokenizerBase,
    ) -> list[TurnTokens]:
        """Extends a text by the turns of a dialogue, one after another."""
        messages = [
            message._replace(content=growing.guarded(message.content)) for message in messages
        ]
        turns = []
        for number, message in enumerate(messages):
            if message.role == "user":
                before = self._jinja_text(messages[: number + 1], tokenizer, prompt=True)
                turns.append(_untrained("user", growing.extend(before)))
            elif message.role == "assistant":
                answer = self._answer(messages[: number + 1], before, tokenizer)
                turns.append(_answer_tokens(answer, growing, tokenizer))
        return turns

    def text(self, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> str:
        """Returns the training text of a dialogue that ends with the assistant, else the prompt."""
        check_dialogue(messages, last=None)
        messages = self._with_system(messages)
        return self._jinja_text(messages, tokenizer, prompt=messages[-1].role == "user")

    def unfinished(
        self, messages: Sequence[Message], text: str, tokenizer: PreTrainedTokenizerBase
    ) -> list[int]:
        """Returns the ids of a prompt and a cut-off response; see `ChatTemplate.unfinished`."""
        check_dialogue(messages, last="user")
        before, _ = self._around_content(tokenizer)
        prompt = self._with_system(messages)
        growing = _GrowingText(tokenizer, [*prompt, Message("assistant", text)])
        turns = self._grow(growing, prompt, tokenizer)
        cut_off = growing.extend(f"{growing.text}{before}{growing.guarded(text)}")
        return [*(one for turn in turns for one in turn.token_ids), *cut_off]

    def content_of(self, text: str, tokenizer: PreTrainedTokenizerBase, *, ended: bool) -> str:
        """Returns the content without the text that the program puts around it."""
        before, after = self._around_content(tokenizer)
        text = text.removeprefix(before)
        return text.removesuffix(after) if ended else text

    def settled_content(self, text: str, tokenizer: PreTrainedTokenizerBase) -> str:
        """Returns the content so far, see `ChatTemplate.settled_content`."""
        before, after = self._around_content(tokenizer)
        if before.startswith(text):
            return ""
        return without_start_of(text.removeprefix(before), (after,)).rstrip()

    def _around_content(self, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
        """Returns the text between prompt and content, and from there to the end of turn.

        Both are read off a small dialogue, without special tokens, which an answer's text lacks
        too; both are empty for a program that changes the content itself.
        """
        probe = Message("assistant", "b")
        question = self._with_system([Message("user", "a")])
        before = self._jinja_text(question, tokenizer, prompt=True)
        answer = self._jinja_text([*question, probe], tokenizer, prompt=False)
        written = answer.removeprefix(before)
        specials = special_strings(tokenizer)
        ends = [written.rfind(one) for one in specials if one in written]
        head, found, tail = written[: max(ends, default=len(written))].partition(probe.content)
        if not found or written == answer:
            return "", ""
        plain = re.compile("|".join(map(re.escape, sorted(specials))) or "(?!)")
        return plain.sub("", head), plain.sub("", tail)

    def stop_token_ids(self, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
        """Returns the end of a turn, from a small dialogue, and EOS if that is another token."""
        rendered = self.render([Message("user", "a"), Message("assistant", "b")], tokenizer)
        last = max(index for index, trained in enumerate(rendered.trained_mask) if trained)
        end_ids = [rendered.token_ids[last], tokenizer.eos_token_id]
        return tuple(dict.fromkeys(end_id for end_id in end_ids if end_id is not None))

    def control_tokens(self, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
        """Returns none: the program writes a text, which is tokenised as a whole."""
        return ()

    def to_jinja(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """Returns the tokenizer's template with the variables, system text and date of this one."""
        source = self._source(tokenizer)
        if self.default_system is None:
            return source
        system = f"[{{'role': 'system', 'content': {literal(self.default_system)}}}]"
        setting = (
            "{%- if messages[0]['role'] != 'system' -%}"
            f"{{%- set messages = {system} + messages -%}}"
            "{%- endif -%}"
        )
        return source if source.startswith(setting) else setting + source

    def _source(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """Returns the rendered program: the tokenizer's, after the variables set here."""
        settings = "".join(
            f"{{%- set {name} = {literal(text)} -%}}" for name, text in self.variables.items()
        )
        source = _with_date(_jinja_source(tokenizer), self.date)
        return source if source.startswith(settings) else settings + source

    def _with_system(self, messages: Sequence[Message]) -> list[Message]:
        if self.default_system is None or messages[0].role == "system":
            return list(messages)
        return [Message("system", self.default_system), *messages]

    def _check_system(
        self, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Raises ValueError for a system text that has no effect on the rendering."""
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
        try:
            text = tokenizer.apply_chat_template(
                _role_and_content(messages),
                chat_template=self._source(tokenizer),
                tokenize=False,
                add_generation_prompt=prompt,
            )
        except (jinja2.TemplateError, TypeError) as problem:
            raise ValueError(
                f"messages: the tokenizer's chat template fails on them: {problem}; choose a "
                "template by its name if it asks for more than messages"
            ) from problem
        return str(text)

    def _generation_blocks(
        self, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase
    ) -> list[tuple[int, int]]:
        """Returns the program's `generation` blocks as (start, end) in characters of the text."""
        from transformers.utils.chat_template_utils import render_jinja_template

        _, blocks = render_jinja_template(
            conversations=[_role_and_content(messages)],
            chat_template=self._source(tokenizer),
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
        return [(start, end) for start, end in blocks[0]]


class _GrowingText:
    """The ids of a text that grows at its end; ids once returned never change."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> None:
        """Starts empty; `messages` are all that it will hold."""
        self._tokenizer = tokenizer
        self._specials = special_strings(tokenizer)
        # Marks cuts; no message holds it.
        used = set().union(*(message.content for message in messages))
        self._cut = next(character for character in _PRIVATE_USE if character not in used)
        # Precedes a text's later parts; any special token will do.
        self._inner_anchor = min(self._specials, default=None)
        self.text = ""
        self._token_ids: list[int] = []

    def guarded(self, text: str) -> str:
        """Returns a content with marks that keep special tokens spelled in it text."""
        return self._cut.join(cut_apart(text, self._specials))

    def extend(self, text: str) -> list[int]:
        """Returns the ids that a longer text adds; ValueError unless it starts with the old one."""
        if not text.startswith(self.text):
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
            added = self._encode(text[len(self.text) :], anchor=self._inner_anchor)
        self.text = text
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
    """Tokenises an answer part by part, with the mask of trained tokens."""
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
    """Returns the parts of an answer: the end of each in the text, and whether it is trained."""
    if answer.blocks is None:
        return [(len(answer.after), True)]
    parts = []
    for start, end in answer.blocks:
        if end > len(answer.before):
            parts += [(max(start, len(answer.before)), False), (end, True)]
    if not parts:
        raise ValueError(
            "messages: the tokenizer's chat template marks no text of an answer as generated, so "
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


@functools.lru_cache
def _with_date(source: str, date: str | None) -> str:
    """Returns the program with a fixed date."""
    if (fixed := _FIXED_DATE.search(source)) is not None:
        if date not in (None, fixed[1]):
            raise ValueError(
                f"template_date={date!r}: the tokenizer's chat template was fixed to {fixed[1]} in "
                "training; leave it out, or take the tokenizer of the base model"
            )
        return source
    asks, takes = "strftime_now" in source, "date_string" in source
    if date is None:
        if not asks:
            return source
        own = _OWN_DATE.search(source)
        day = datetime.datetime.strptime(own[1], _OWN_FORMAT).date() if own else _DEFAULT_DATE
    elif not asks and not takes:
        raise ValueError(
            f"template_date={date!r} must be None: the tokenizer's chat template prints no date"
        )
    else:
        day = datetime.date.fromisoformat(date)
    prefix = f"{{#- Dates are those of {day.isoformat()}. -#}}"
    if takes and date is not None:
        prefix += f"{{%- set date_string = {literal(day.strftime(_OWN_FORMAT))} -%}}"
    if asks:
        known = {f"%{one}": day.strftime(f"%{one}") for one in _DIRECTIVES}
        known = {"%-d": str(day.day), "%-m": str(day.month)} | known | {"%z": "", "%Z": ""}
        steps = "".join(f" | replace({literal(a)}, {literal(b)})" for a, b in known.items())
        prefix += f"{{%- macro strftime_now(format) -%}}{{{{- format{steps} -}}}}{{%- endmacro -%}}"
    return prefix + source
