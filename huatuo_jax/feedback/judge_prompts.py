"""What a language model is asked as a judge: template files, and texts put into them.

A template is a UTF-8 file with the lines `[system]` and `[user]`, each before its message, and with
places such as `{{dialogue}}` that are filled in one pass, so that nothing in a text is taken for a
place. `{{mark}}` is a number that depends on the texts: a writer who wants to break out of the
marks around a text would have to know it beforehand.
"""

import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from huatuo_jax.data.records import Message, Prompt
from huatuo_jax.feedback.judgements import Protocol, sha256

_FOLDER = pathlib.Path(__file__).with_name("prompts")
_PLACE = re.compile(r"\{\{(\w+)\}\}")
_REQUIRED: Mapping[Protocol, frozenset[str]] = {
    "score": frozenset({"dialogue", "reference", "answer", "low", "high"}),
    "pairwise": frozenset({"dialogue", "reference", "first", "second"}),
}
_SPEAKERS = {"system": "系统", "user": "患者", "assistant": "医生"}
_NO_REFERENCE = "（没有参考，请以医学共识为准。）"
_HASH_DIGITS = 16
_MARK_DIGITS = 8


@dataclass(frozen=True)
class JudgePrompt:
    """A template that is ready to be filled.

    Attributes:
        protocol: the one it is for.
        system: the system message, with places.
        user: the user message, with places.
        hash: of the file's text.
    """

    protocol: Protocol
    system: str
    user: str
    hash: str

    def render(
        self,
        prompt: Prompt,
        texts: Sequence[str],
        *,
        low: int,
        high: int,
        require_reference: bool = True,
    ) -> list[dict[str, str]]:
        """The messages that ask about one text (a score) or two (a comparison).

        Args:
            prompt: the whole dialogue before the answer, and what the doctor said.
            texts: the answers, in the order shown.
            low: the worst score.
            high: the best score.
            require_reference: refuse a prompt with neither a doctor's answer nor a diagnosis.

        Raises:
            ValueError: there is no reference.
        """
        if require_reference and not (_given(prompt.reference) or _given(prompt.diagnosis)):
            raise ValueError(
                f"prompt {prompt.id!r} has neither a reference nor a diagnosis for the judge to"
                " lean on; --norequire_reference judges without"
            )
        dialogue = "\n".join(map(_spoken, prompt.messages))
        values = {
            "dialogue": dialogue,
            "reference": _reference(prompt),
            "low": str(low),
            "high": str(high),
            "mark": sha256("\0".join([dialogue, *texts]))[:_MARK_DIGITS],
            **dict(zip(_names_of_texts(self.protocol), texts, strict=True)),
        }
        return [
            {"role": role, "content": _sendable(_PLACE.sub(lambda place: values[place[1]], part))}
            for role, part in (("system", self.system), ("user", self.user))
            if part
        ]


def read_judge_prompt(
    protocol: Protocol, path: str | os.PathLike[str] | None = None
) -> JudgePrompt:
    """The template of a file.

    Args:
        protocol: the one it is for.
        path: the user's file; None for the one that is shipped.

    Raises:
        ValueError: no such file, no `[user]` part, a place that is unknown, or one that is missing.
    """
    path = _FOLDER / f"{protocol}.txt" if path is None else pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"judge's template: there is no file {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"judge's template {path} should be UTF-8: {error}") from error
    system, user = _parts(text, path)
    places = set(_PLACE.findall(system + user))
    lacking = sorted(_REQUIRED[protocol] - places)
    unknown = sorted(places - _REQUIRED[protocol] - {"mark", "low", "high"})
    if lacking or unknown:
        wrong = f"lacks {{{{{lacking[0]}}}}}" if lacking else f"has unknown {{{{{unknown[0]}}}}}"
        names = ", ".join(sorted(_REQUIRED[protocol]))
        raise ValueError(f"judge's template {path} {wrong}; for {protocol} it needs {names}")
    return JudgePrompt(protocol, system, user, sha256(text)[:_HASH_DIGITS])


def _parts(text: str, path: pathlib.Path) -> tuple[str, str]:
    pieces = re.split(r"^\[(system|user)\][ \t]*$", text, flags=re.MULTILINE)
    parts = dict(zip(pieces[1::2], (piece.strip() for piece in pieces[2::2]), strict=True))
    names = pieces[1::2]
    if pieces[0].strip() or names not in (["system", "user"], ["user"]) or not parts["user"]:
        raise ValueError(
            f"judge's template {path} should be a line [system] and its text (or none), then a"
            " line [user] and its text"
        )
    return parts["system"] if "system" in parts else "", parts["user"]


def _names_of_texts(protocol: Protocol) -> tuple[str, ...]:
    return ("answer",) if protocol == "score" else ("first", "second")


def _spoken(message: Message) -> str:
    return f"{_SPEAKERS[message.role]}：{message.content}"


def _reference(prompt: Prompt) -> str:
    parts = []
    if _given(prompt.reference):
        parts.append(f"医生当时的回答：{prompt.reference}")
    if _given(prompt.diagnosis):
        parts.append(f"医生的诊断：{prompt.diagnosis}")
    return "\n".join(parts) if parts else _NO_REFERENCE


def _sendable(text: str) -> str:
    """The text with a question mark for each half of a broken character, which UTF-8 lacks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _given(text: str | None) -> bool:
    return text is not None and bool(text.strip())
