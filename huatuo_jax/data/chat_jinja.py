"""Chat templates in Jinja, for the tokenizer of an exported model."""

import json


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
