"""Quotes texts for a judge between marks that their writers could not foresee, and reads its JSON.

The mark is a hash of all quoted texts, so a text that tries to close its own quotation would have
to contain the hash of itself. No text is put into another by replacing a placeholder.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from huatuo_jax.judge.judgements import sha256
from huatuo_jax.judge.replies import BadReply, final_answer

ChatMessage = dict[str, str]
"""A message as it is sent to a server: role and content."""

_MARK_DIGITS = 16


class Quoted(NamedTuple):
    """Texts between marks.

    Attributes:
        text: all quotations, in order, with a blank line between two.
        mark: the hexadecimal digits that stand in the lines around each quotation.
    """

    text: str
    mark: str


def quote(parts: Sequence[tuple[str, str]]) -> Quoted:
    r"""Puts each text between the lines `<NAME MARK>` and `</NAME MARK>`.

    Args:
        parts: name and text of each quotation. Halves of surrogate pairs, which UTF-8 lacks,
            become question marks; nothing else of a text is changed.
    """
    texts = [text.encode("utf-8", "replace").decode("utf-8") for _, text in parts]
    names = [name for name, _ in parts]
    mark = sha256("\0".join(part for pair in zip(names, texts, strict=True) for part in pair))
    mark = mark[:_MARK_DIGITS]
    blocks = [
        f"<{name} {mark}>\n{text}\n</{name} {mark}>"
        for name, text in zip(names, texts, strict=True)
    ]
    return Quoted("\n\n".join(blocks), mark)


def read_object(reply: str) -> dict[str, Any]:
    """Returns the JSON object that a reply consists of, behind any thoughts and inside any fence.

    Raises:
        BadReply: the reply has no such object, or one with a field twice or with NaN.
    """
    return final_answer(reply)[1]


__all__ = ["BadReply", "ChatMessage", "Quoted", "quote", "read_object"]
