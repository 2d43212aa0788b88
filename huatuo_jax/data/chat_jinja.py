"""Chat templates in Jinja, for the tokenizer of an exported model."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from huatuo_jax.data.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from huatuo_jax.data.chat import ChatTemplate

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


def exported_source(template: ChatTemplate, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A template in Jinja for a tokenizer's files; None where they hold it already.

    Where tokenising its whole text does not give the tokens of training, a comment says so.
    """
    source = template.to_jinja(tokenizer)
    if is_held(source, tokenizer):
        return None
    return source if _gives_the_tokens(source, template, tokenizer) else _OTHER_TOKENS + source


def is_held(source: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer's chat template is this source, as `exported_source` gives it."""
    own = own_source(tokenizer)
    return own is not None and own.removeprefix(_OTHER_TOKENS) == source


def own_source(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The one chat template of a tokenizer; None where it has none, or several."""
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default") if len(own) == 1 else None
    return own if isinstance(own, str) else None


def default_system_in(source: str) -> tuple[str | None] | None:
    """The default system text of a source that `jinja_source` made, as a tuple of one.

    None for any other source.
    """
    found = _DEFAULT_SYSTEM.search(source)
    if found is None:
        return None
    return (None,) if found[1] == literal(None) else (str(json.loads(found[1])),)


def _gives_the_tokens(
    source: str, template: ChatTemplate, tokenizer: PreTrainedTokenizerBase
) -> bool:
    """Whether transformers, given the source, tokenises some dialogues as training does."""
    return all(
        tokenizer.apply_chat_template(
            [message._asdict() for message in messages], chat_template=source, return_dict=False
        )
        == template.render(messages, tokenizer).token_ids
        for messages in _PROBES
    )


def literal(text: str | None) -> str:
    """A string as a Jinja literal (JSON's escapes are Jinja's too), None as `none`."""
    return "none" if text is None else json.dumps(text, ensure_ascii=False)


def jinja_source(
    default_system: str | None, *, opening: str, question: str, answer: str, answer_header: str
) -> str:
    """A chat template in Jinja around four Jinja expressions.

    They see `system` (none where there is none) and, in turns, `message` and `loop`.
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
