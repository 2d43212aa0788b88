"""From the pieces of a template to token ids: control tokens as ids, texts as plain text.

A control token (`<|im_start|>`, EOS) is looked up by its string and never parsed out of a text.
A text is tokenised as it would be in the whole rendering, where special tokens cut the text first:
right after the control token it follows (this matters to SentencePiece, which treats the start of
a text differently), or as the start of a text of its own where the template says so (`apart`).

Two texts in a row, such as `assistant` + newline and the answer, are where generation starts, so
their border must be a border of tokens. They are tokenised together, and where the first one's
tokens come out unchanged, that is the result: it is what tokenising the whole rendering gives.
Where they do not (an answer that begins with a newline, after a header that ends with one), the
second text is tokenised by itself, because a model that generates has the header's tokens behind
it and cannot take them back. There, and only there, ids differ from the whole text's.

Text that spells a special token (`</s>` in a patient's question) stays text: it is cut after its
first character and the parts are tokenised one by one. `apply_chat_template` would make it a real
control token unless it is called with `sanitize_control_tokens=True`. Added tokens that are not
special, such as `<think>` in some tokenizers, are left to the tokenizer, as transformers does.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Piece(NamedTuple):
    """A part of a rendering that is tokenised on its own.

    `control`: the text is the string of one token. `trained`: its tokens are learned.
    `apart`: a text that is tokenised as if nothing stood before it.
    """

    text: str
    control: bool = False
    trained: bool = False
    apart: bool = False


def control(text: str, *, trained: bool = False) -> Piece:
    """A piece that is one token of the tokenizer."""
    return Piece(text, control=True, trained=trained)


def control_id(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """The id of a control token; ValueError if the tokenizer does not have it."""
    token_id = tokenizer.convert_tokens_to_ids(text)
    if token_id is None or (token_id == tokenizer.unk_token_id and text != tokenizer.unk_token):
        raise ValueError(
            f"tokenizer: has no token {text!r}, which the template needs; choose a template that "
            "fits the tokenizer, or add the token to it (and to the embeddings) as a special token"
        )
    return int(token_id)


def special_strings(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """The strings of the special tokens, which a text of a dialogue may only spell.

    One-character ones are left out: they are ordinary text used for padding, not structure.
    """
    added = tokenizer.added_tokens_decoder.values()
    strings = {token.content for token in added if token.special}
    return frozenset(text for text in strings.union(tokenizer.all_special_tokens) if len(text) > 1)


@functools.lru_cache(maxsize=16)
def _any_of(strings: frozenset[str]) -> re.Pattern[str]:
    # "(?!)" matches nothing: a tokenizer without special tokens has nothing to protect.
    return re.compile("|".join(map(re.escape, sorted(strings))) or "(?!)")


def cut_apart(text: str, strings: frozenset[str]) -> list[str]:
    """Cuts a text into chunks that join to it and none of which holds one of the strings.

    The strings have two characters or more; each occurrence is cut after its first character.
    """
    chunks: list[str] = []
    start = 0
    pattern = _any_of(strings)
    while match := pattern.search(text, start):
        chunks.append(text[start : match.start() + 1])
        start = match.start() + 1
    return [*chunks, text[start:]]


def encode_after(tokenizer: PreTrainedTokenizerBase, anchor: str | None, text: str) -> list[int]:
    """The ids a text has right after a control token, or at the start of a text if None."""
    # Not verbose: how long a row may be is for `truncate` to say, not for the tokenizer to warn.
    if anchor is None:
        return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))
    token_ids = tokenizer.encode(anchor + text, add_special_tokens=False, verbose=False)
    if token_ids[:1] != [control_id(tokenizer, anchor)]:
        raise ValueError(
            f"tokenizer: reads {anchor!r} as text, though it is in its vocabulary; "
            "add it as a special token (`add_special_tokens`)"
        )
    return list(token_ids[1:])


class PieceEncoder:
    """Tokenises the pieces of one rendering in order.

    `controls` are the control tokens of the template; with the tokenizer's special tokens they are
    what a text may not become. Raises ValueError where the tokenizer lacks one of them, or makes
    one out of plain text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, controls: Iterable[str]) -> None:
        """Looks the control tokens up; ValueError for one the tokenizer does not have."""
        self._tokenizer = tokenizer
        self._ids = {text: control_id(tokenizer, text) for text in controls}
        specials = special_strings(tokenizer)
        self._protected = specials | {text for text in self._ids if len(text) > 1}
        # The unknown token is what a character outside the vocabulary becomes: nothing's control.
        protected_ids = {control_id(tokenizer, text) for text in self._protected}
        self._protected_ids = protected_ids - {tokenizer.unk_token_id}
        # What stands before the later parts of a text that was cut; any special token will do.
        self._inner_anchor = min(specials, default=None)
        self._anchor: str | None = None
        self._joined = ""
        self._joined_ids: list[int] = []

    def encode(self, piece: Piece) -> list[int]:
        """The ids of the next piece, given the pieces before it."""
        if piece.control or piece.apart:
            self._anchor = piece.text if piece.control else None
            self._joined, self._joined_ids = "", []
        if piece.control:
            return [self._ids[piece.text]]
        together = self._encode_text(self._joined + piece.text)
        border = len(self._joined_ids)
        if together[:border] == self._joined_ids:
            token_ids = together[border:]
        else:
            token_ids = self._encode_text(piece.text)
        self._joined += piece.text
        self._joined_ids = self._joined_ids + token_ids
        return token_ids

    def _encode_text(self, text: str) -> list[int]:
        anchor = self._anchor
        token_ids: list[int] = []
        for chunk in cut_apart(text, self._protected):
            token_ids += encode_after(self._tokenizer, anchor, chunk)
            anchor = self._inner_anchor
        made = self._protected_ids.intersection(token_ids)
        if made:
            raise ValueError(
                f"tokenizer: makes {self._tokenizer.convert_ids_to_tokens(min(made))!r} out of "
                f"plain text ({text[:40]!r}); its special tokens must not be ordinary pieces"
            )
        return token_ids


def start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The special tokens that the tokenizer puts before a text by itself, often BOS or none."""
    text = tokenizer.encode("a", add_special_tokens=False)
    wrapped = tokenizer.encode("a", add_special_tokens=True)
    for start in range(len(wrapped) - len(text) + 1):
        if wrapped[start : start + len(text)] == text:
            return list(tokenizer.convert_ids_to_tokens(wrapped[:start]))
    raise ValueError(
        "tokenizer: with special tokens the ids of 'a' change, so its start tokens are not known"
    )


def named_token(tokenizer: PreTrainedTokenizerBase, name: Literal["bos_token", "eos_token"]) -> str:
    """The string of the tokenizer's BOS or EOS; ValueError if it has none."""
    text = tokenizer.special_tokens_map.get(name)
    if text is None:
        raise ValueError(f"tokenizer: has no {name}, which the template needs; set it")
    return str(text)


def token_of_id(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    """The string of a token id; ValueError if the vocabulary ends before it."""
    if token_id >= len(tokenizer):
        raise ValueError(
            f"tokenizer: has {len(tokenizer)} tokens, and the template needs token {token_id}"
        )
    return str(tokenizer.convert_ids_to_tokens(token_id))


def with_eos(token_id: int, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """A stop token's id, and that of EOS if the tokenizer has another one."""
    if tokenizer.eos_token_id is None or tokenizer.eos_token_id == token_id:
        return (token_id,)
    return (token_id, int(tokenizer.eos_token_id))
