"""The named chat templates: HuatuoGPT, ChatML, Llama-2, Llama-3 and Baichuan.

Each defines the pieces of its turns, and the same text in Jinja for an exported tokenizer. A system
message replaces the template's default system text; each class documents where it goes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from huatuo_jax.data.chat.template import (
    ChatTemplate,
    Piece,
    PieceTemplate,
    Turn,
    control,
    named_token,
    split_system,
    start_tokens,
    token_of_id,
)
from huatuo_jax.data.chat.tokenizer_template import (
    TokenizerTemplate,
    default_system_in,
    is_held,
    jinja_source,
    literal,
    own_source,
)
from huatuo_jax.data.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HUATUOGPT_SYSTEM = (
    "一位用户和智能医疗大模型HuatuoGPT之间的对话。"
    "对于用户的医疗问诊，HuatuoGPT给出准确的、详细的、温暖的指导建议。"
    "对于用户的指令问题，HuatuoGPT给出有益的、详细的、有礼貌的回答。"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HuatuoGPTTemplate(PieceTemplate):
    """HuatuoGPT's own template, to the letter of its training script.

    Start tokens the tokenizer itself would add, system text, then `<病人>：` question and
    `<HuatuoGPT>：` answer, each followed by one space, the answer also by EOS. Every turn is
    tokenised as a text of its own. Trained are the whole assistant turns, role prefix included.
    A system message takes the place of the default text.

    The training script lets an answer's first character merge with the `：` before it, which
    generation cannot; here the role prefix keeps its tokens (Baichuan's vocabulary has no such
    merge, Qwen's has `：“`). Exported as Jinja, the text is the same, but tokenising it whole may
    merge across turns, unless the exported tokenizer splits a text there
    (`huatuo_jax.training.initial_model`).
    """

    name: ClassVar[str] = "huatuogpt"
    turn_marks: ClassVar[tuple[str, ...]] = ("<病人>：", "<HuatuoGPT>：")
    default_system: str | None = HUATUOGPT_SYSTEM

    def _opening(self, system: str | None, tokenizer: PreTrainedTokenizerBase) -> tuple[Piece, ...]:
        pieces = tuple(control(text) for text in start_tokens(tokenizer))
        return pieces if system is None else (*pieces, Piece(system, apart=True))

    def _question(self, content: str, tokenizer: PreTrainedTokenizerBase) -> tuple[Piece, ...]:
        return (Piece(f"<病人>：{content} ", apart=True),)

    def _answer_header(self, tokenizer: PreTrainedTokenizerBase) -> tuple[Piece, ...]:
        return (Piece("<HuatuoGPT>：", trained=True, apart=True),)

    def _answer(self, content: str, tokenizer: PreTrainedTokenizerBase) -> tuple[Piece, ...]:
        text = Piece(f"{content} ", trained=True)
        return (text, control(self._end(tokenizer), trained=True))

    def content_of(self, text: str, tokenizer: PreTrainedTokenizerBase, *, ended: bool) -> str:
        """Returns the text without the space before EOS."""
        return text.removesuffix(" ") if ended else text

    def to_jinja(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """Returns the template in Jinja: the same text, but not always the same ids."""
        return jinja_source(
            self.default_system,
            opening=f"{literal(''.join(start_tokens(tokenizer)))} + (system or '')",
            question="'<病人>：' + message['content'] + ' '",
            answer="'<HuatuoGPT>：' + message['content'] + ' ' + eos_token",
            answer_header="'<HuatuoGPT>：'",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatMLTemplate(PieceTemplate):
    """ChatML, as Qwen uses it: `<|im_start|>` role, newline, content, `<|im_end|>`, newline.

    Trained are the answer and its `<|im_end|>`. The system text is a turn of its own. Qwen's models
    differ in their default system text, so there is none unless `default_system` gives one.
    """

    name: ClassVar[str] = "chatml"
    _end_token: ClassVar[str | None] = "<|im_end|>"

    def _opening(self, system: str | None, tokenizer: PreTrainedTokenizerBase) -> tuple[Piece, ...]:
        return () if system is None else self._closed_turn("system", system)

    def _question(self, content: str, tokenizer: PreTrainedTokenizerBase) -> tuple[Piece, ...]:
        return self._closed_turn("user", content)

    def _answer_header(self, tokenizer: PreTrainedTokenizerBase) -> tuple[Piece, ...]:
        return (control("<|im_start|>"), Piece("assistant\n"))

    def _answer(self, content: str, tokenizer: PreTrainedTokenizerBase) -> tuple[Piece, ...]:
        return (
            Piece(content, trained=True),
            control(self._end(tokenizer), trained=True),
            Piece("\n"),
        )

    def _closed_turn(self, role: str, content: str) -> tuple[Piece, ...]:
        return (
            control("<|im_start|>"),
            Piece(f"{role}\n{content}"),
            control("<|im_end|>"),
            Piece("\n"),
        )

    def to_jinja(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """Returns the template in Jinja."""
        turn = "'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n'"
        system = "'<|im_start|>system\\n' + system + '<|im_end|>\\n'"
        return jinja_source(
            self.default_system,
            opening=f"{system} if system is not none else ''",
            question=turn,
            answer=turn,
            answer_header="'<|im_start|>assistant\\n'",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama2Template(PieceTemplate):
    """Llama-2-Chat: BOS `[INST]` question `[/INST]` answer EOS, with contents stripped.

    The system text is inside the first question, between `<<SYS>>` marks. Trained are the
    answer, with the space before and after it, and EOS.
    """

    name: ClassVar[str] = "llama2"
    _before_content: ClassVar[str] = " "
    _strips_content: ClassVar[bool] = True

    def _turns(self, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[Turn]:
        system, spoken = split_system(messages, self.default_system)
        if system is not None:
            content = f"<<SYS>>\n{system}\n<</SYS>>\n\n{spoken[0].content}"
            spoken = [Message("user", content), *spoken[1:]]
        return super()._turns(spoken, tokenizer)

    def _opening(self, system: str | None, tokenizer: PreTrainedTokenizerBase) -> tuple[Piece, ...]:
        return ()

    def _question(self, content: str, tokenizer: PreTrainedTokenizerBase) -> tuple[Piece, ...]:
        text = Piece(f"[INST] {content.strip()} [/INST]")
        return (control(named_token(tokenizer, "bos_token")), text)

    def _answer_header(self, tokenizer: PreTrainedTokenizerBase) -> tuple[Piece, ...]:
        return ()

    def _answer(self, content: str, tokenizer: PreTrainedTokenizerBase) -> tuple[Piece, ...]:
        text = Piece(f"{self._before_content}{content.strip()} ", trained=True)
        return (text, control(self._end(tokenizer), trained=True))

    def to_jinja(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """Returns the template in Jinja."""
        wrapped = "'<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content']"
        content = f"({wrapped} if loop.first and system is not none else message['content'])"
        return jinja_source(
            self.default_system,
            opening="''",
            question=f"bos_token + '[INST] ' + {content} | trim + ' [/INST]'",
            answer="' ' + message['content'] | trim + ' ' + eos_token",
            answer_header="''",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Template(PieceTemplate):
    """Llama-3-Instruct: role headers, two newlines, stripped content, `<|eot_id|>`.

    Trained are the answer and its `<|eot_id|>`. The system text is a turn of its own. Llama 3.1
    and later write a date into it: use their tokenizer's own template for them.
    """

    name: ClassVar[str] = "llama3"
    _end_token: ClassVar[str | None] = "<|eot_id|>"
    _strips_content: ClassVar[bool] = True

    def _opening(self, system: str | None, tokenizer: PreTrainedTokenizerBase) -> tuple[Piece, ...]:
        turn = () if system is None else self._closed_turn("system", system)
        return (control(named_token(tokenizer, "bos_token")), *turn)

    def _question(self, content: str, tokenizer: PreTrainedTokenizerBase) -> tuple[Piece, ...]:
        return self._closed_turn("user", content)

    def _answer_header(self, tokenizer: PreTrainedTokenizerBase) -> tuple[Piece, ...]:
        return (*self._role("assistant"), Piece("\n\n"))

    def _answer(self, content: str, tokenizer: PreTrainedTokenizerBase) -> tuple[Piece, ...]:
        return (Piece(content.strip(), trained=True), control(self._end(tokenizer), trained=True))

    def _role(self, role: str) -> tuple[Piece, ...]:
        return (control("<|start_header_id|>"), Piece(role), control("<|end_header_id|>"))

    def _closed_turn(self, role: str, content: str) -> tuple[Piece, ...]:
        return (*self._role(role), Piece(f"\n\n{content.strip()}"), control("<|eot_id|>"))

    def to_jinja(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """Returns the template in Jinja."""
        header = "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
        turn = f"{header} + message['content'] | trim + '<|eot_id|>'"
        system_header = "'<|start_header_id|>system<|end_header_id|>\\n\\n'"
        system = f"{system_header} + system | trim + '<|eot_id|>'"
        return jinja_source(
            self.default_system,
            opening=f"bos_token + ({system} if system is not none else '')",
            question=turn,
            answer=turn,
            answer_header="'<|start_header_id|>assistant<|end_header_id|>\\n\\n'",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaichuanTemplate(PieceTemplate):
    """Baichuan-13B-Chat and Baichuan2-Chat: a reserved token before each turn, named by its id.

    The system text comes first, bare. Each content is tokenised as a text of its own, as the
    makers' code does. Trained are the answer and EOS, which follows every answer here; the makers'
    code feeds EOS only after the last one and elsewhere learns it as the label of the next user
    token, so a dialogue of several turns has one more token per earlier answer here.
    """

    name: ClassVar[str] = "baichuan"
    user_token_id: int = 195
    assistant_token_id: int = 196

    def _opening(self, system: str | None, tokenizer: PreTrainedTokenizerBase) -> tuple[Piece, ...]:
        return () if system is None else (Piece(system, apart=True),)

    def _question(self, content: str, tokenizer: PreTrainedTokenizerBase) -> tuple[Piece, ...]:
        return (control(token_of_id(tokenizer, self.user_token_id)), Piece(content, apart=True))

    def _answer_header(self, tokenizer: PreTrainedTokenizerBase) -> tuple[Piece, ...]:
        return (control(token_of_id(tokenizer, self.assistant_token_id)),)

    def _answer(self, content: str, tokenizer: PreTrainedTokenizerBase) -> tuple[Piece, ...]:
        text = Piece(content, trained=True, apart=True)
        return (text, control(self._end(tokenizer), trained=True))

    def stop_token_ids(self, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
        """Returns EOS, and the user token, with which the makers' models may end a turn."""
        return (*super().stop_token_ids(tokenizer), self.user_token_id)

    def to_jinja(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """Returns the template in Jinja: the same text, but not always the same ids."""
        user = literal(token_of_id(tokenizer, self.user_token_id))
        assistant = literal(token_of_id(tokenizer, self.assistant_token_id))
        return jinja_source(
            self.default_system,
            opening="system or ''",
            question=f"{user} + message['content']",
            answer=f"{assistant} + message['content'] + eos_token",
            answer_header=assistant,
        )


TEMPLATES: dict[str, type[ChatTemplate]] = {
    "huatuogpt": HuatuoGPTTemplate,
    "chatml": ChatMLTemplate,
    "llama2": Llama2Template,
    "llama3": Llama3Template,
    "baichuan": BaichuanTemplate,
    "tokenizer": TokenizerTemplate,
}


def by_name(
    name: str, *, default_system: str | None = None, date: str | None = None
) -> ChatTemplate:
    """Returns the template of that name, with its default system text replaced if one is given.

    Args:
        name: `tokenizer` is the tokenizer's own template.
        default_system: None for the template's own.
        date: for `tokenizer`: today's date for a program that prints one, as 2024-07-26, in
            training and afterwards; None for the program's own default date, or for 2024-07-26 if
            it has none.

    Raises:
        ValueError: an unknown name, or a date for a template that prints none.
    """
    if name not in TEMPLATES:
        raise ValueError(f"template: {name!r} is not known; known are {', '.join(TEMPLATES)}")
    if date is not None and name != TokenizerTemplate.name:
        raise ValueError(f"template_date={date!r} must be None for {name!r}, which prints no date")
    template = TEMPLATES[name]() if date is None else TokenizerTemplate(date=date)
    if default_system is None:
        return template
    return dataclasses.replace(template, default_system=default_system)


def for_tokenizer(
    tokenizer: PreTrainedTokenizerBase,
    name: str | None = None,
    *,
    default_system: str | None = None,
    date: str | None = None,
) -> ChatTemplate:
    """Returns the template of that name; without one, the tokenizer's own, else HuatuoGPT's.

    A tokenizer whose chat template was exported from a named template gets that template, with the
    same default system text, so that its tokens are those of training.

    Args:
        tokenizer: the model's.
        name: as for `by_name`; None leaves the choice to the tokenizer.
        default_system: as for `by_name`.
        date: as for `by_name`.

    Raises:
        ValueError: as `by_name`.
    """
    if name is not None:
        return by_name(name, default_system=default_system, date=date)
    exported = _exported_here(tokenizer)
    if exported is None:
        has_own = tokenizer.chat_template is not None
        name = TokenizerTemplate.name if has_own else HuatuoGPTTemplate.name
        return by_name(name, default_system=default_system, date=date)
    if default_system is None:
        default_system = exported.default_system
    return dataclasses.replace(by_name(exported.name, date=date), default_system=default_system)


def _exported_here(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate | None:
    """Returns the named template that a chat template was exported from; None for others."""
    source = own_source(tokenizer)
    system = None if source is None else default_system_in(source)
    if system is None:
        return None
    for kind in TEMPLATES.values():
        if kind is TokenizerTemplate:
            continue
        template = kind(default_system=system[0])
        try:
            found = is_held(template.to_jinja(tokenizer), tokenizer)
        except ValueError:  # The tokenizer lacks tokens of this template.
            continue
        if found:
            return template
    return None
