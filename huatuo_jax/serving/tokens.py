"""Tokens as a client sees them: each one's text and bytes, and log-probabilities beside them."""

import functools
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import transformers

from huatuo_jax.data.answers import text_of

_BYTE = re.compile("<0x([0-9A-F]{2})>")  # Of SentencePiece's byte fallback.
_SPACE = "\u2581"  # SentencePiece's.
_IMPOSSIBLE = -9999.0

TopLogProbs = Sequence[tuple[int, float]]
"""The ids of the best tokens with their log-probabilities, best first."""


class Token(NamedTuple):
    """A token.

    Attributes:
        text: its string; `bytes:` and their escapes where its bytes are no whole characters.
        bytes: of the text.
    """

    text: str
    bytes: bytes


class Tokens:
    """The tokens of a tokenizer."""

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
        """Reads how the tokenizer writes bytes.

        Args:
            tokenizer: the model's.
        """
        self._tokenizer = tokenizer
        self._byte_of = _byte_level() if _is_byte_level(tokenizer) else None
        self._added = {token_id: str(one) for token_id, one in _added(tokenizer)}
        self.of = functools.lru_cache(maxsize=None)(self._of)
        """Returns the token of an id; one behind the tokenizer's last has an empty text."""

    def named(self, token_ids: Iterable[int]) -> dict[int, str]:
        """Returns names of different tokens, no two alike: the text, or `token_id:` and the id."""
        names: dict[int, str] = {}
        for token_id in token_ids:
            name = self.of(token_id).text
            names[token_id] = f"token_id:{token_id}" if name in names.values() else name
        return names

    def _of(self, token_id: int) -> Token:
        if token_id in self._added:
            text = self._added[token_id]
            return Token(text, text.encode())
        written = self._tokenizer.convert_ids_to_tokens(token_id)
        if not isinstance(written, str):
            return Token("", b"")
        found = self._bytes(written)
        try:
            return Token(found.decode(), found)
        except UnicodeDecodeError:
            return Token("bytes:" + "".join(f"\\x{one:02x}" for one in found), found)

    def _bytes(self, written: str) -> bytes:
        if self._byte_of is not None:
            if all(one in self._byte_of for one in written):
                return bytes(self._byte_of[one] for one in written)
            return written.encode()
        if match := _BYTE.fullmatch(written):
            return bytes([int(match[1], 16)])
        return written.replace(_SPACE, " ").encode()


def plain_text(tokenizer: transformers.PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """Returns the text of token ids, special tokens included."""
    text = tokenizer.decode(
        list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    assert isinstance(text, str)
    return text


def _is_byte_level(tokenizer: transformers.PreTrainedTokenizerBase) -> bool:
    """Returns True where tokens are written in the alphabet of bytes of GPT-2."""
    token_ids = tokenizer.encode("中", add_special_tokens=False, verbose=False)
    written = "".join(map(str, tokenizer.convert_ids_to_tokens(token_ids)))
    return "ä¸Ń" in written and text_of(tokenizer, token_ids) == "中"


def _byte_level() -> dict[str, int]:
    """Returns GPT-2's alphabet: the printable bytes as they are, the others from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [one for one in range(256) if one not in printable]
    found = {chr(one): one for one in printable}
    return found | {chr(256 + place): one for place, one in enumerate(others)}


def _added(
    tokenizer: transformers.PreTrainedTokenizerBase,
) -> Iterable[tuple[int, object]]:
    return tokenizer.added_tokens_decoder.items()


def finite(log_prob: float) -> float:
    """Returns a log-probability that JSON can hold: that of an impossible token is -9999."""
    return max(log_prob, _IMPOSSIBLE)
