"""Texts of answers: ids to text, and where a stop string ends one."""

from collections.abc import Sequence
from typing import NamedTuple

import transformers

from huatuo_jax.data.answers import text_of


class Cut(NamedTuple):
    """An answer that a stop string ends: its ids, and its text before that string."""

    num_tokens: int
    text: str


def find_stop(
    tokenizer: transformers.PreTrainedTokenizerBase,
    token_ids: Sequence[int],
    stop_strings: Sequence[str],
    *,
    first: int,
) -> Cut | None:
    """Where the first stop string completes, None while none has.

    Args:
        tokenizer: the model's.
        token_ids: of an answer.
        stop_strings: texts that end it.
        first: the shortest length in tokens at which it may end; what was complete before is
            passed over.
    """
    # A character whose bytes are not all there yet decodes to U+FFFD, and may still change.
    passed = len(text_of(tokenizer, token_ids[: first - 1]).rstrip("\ufffd"))

    def start(text: str) -> int | None:
        found = [text.find(stop, max(0, passed - len(stop) + 1)) for stop in stop_strings]
        return min((place for place in found if place >= 0), default=None)

    if start(text_of(tokenizer, token_ids)) is None:
        return None
    for num_tokens in range(first, len(token_ids) + 1):
        text = text_of(tokenizer, token_ids[:num_tokens])
        place = start(text)
        if place is not None:
            return Cut(num_tokens, text[:place])
    return None
