"""The held-out split, told from a dialogue's own content.

Whether a dialogue is held out depends on its text, the salt and the share, and on nothing else: it
stays where it is when data is added, removed or reordered. A larger share keeps all that a smaller
one held out.
"""

import hashlib
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from huatuo_jax.data.records import Message

Item = TypeVar("Item")

_TURN_BREAK = "\n"  # Stands in no normalised text, so turns cannot run into each other unseen.


@dataclass(frozen=True, kw_only=True)
class HeldOutConfig:
    """What share of the dialogues is held out, 0 to 1, and the salt of the draw."""

    share: float = 0.02
    salt: str = "held-out"

    def __post_init__(self) -> None:
        """Refuses a share that leaves nothing to train."""
        if not 0.0 <= self.share < 1.0:
            raise ValueError(f"held_out.share: {self.share}, it should be 0 or more and below 1")

    def holds_out(self, text: str) -> bool:
        """Tells whether the dialogue of this normalised text (`dialogue_text`) is held out."""
        salted = hashlib.blake2b(
            text.encode("utf-8", "surrogatepass"), digest_size=8, key=_salt_key(self.salt)
        )
        return int.from_bytes(salted.digest(), "big") < self.share * 2**64


def normalised(text: str) -> str:
    """A text without what copies differ in: width and form of characters, case, white space."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(folded.split())


def dialogue_text(messages: Sequence[Message]) -> str:
    """The normalised turns of a dialogue, one a line; equal texts are duplicates.

    The system message is left out: it is mostly one text over a whole source, and the dialogue
    under it is no other dialogue.
    """
    spoken = (message for message in messages if message.role != "system")
    return _TURN_BREAK.join(normalised(message.content) for message in spoken)


def chosen_by_content(
    items: Sequence[Item], limit: int | None, *, text: Callable[[Item], str]
) -> list[Item]:
    """Selects at most `limit` items by a hash of their text, in the order given.

    Args:
        items: to choose from.
        limit: how many; None for all.
        text: the content of one.
    """
    if limit is None or len(items) <= limit:
        return list(items)
    digests = [hashlib.sha256(text(one).encode("utf-8", "surrogatepass")).digest() for one in items]
    kept = sorted(range(len(items)), key=digests.__getitem__)[:limit]
    return [items[index] for index in sorted(kept)]


def _salt_key(salt: str) -> bytes:
    """The salt as a hash key; blake2b takes at most 64 bytes."""
    return hashlib.sha256(salt.encode("utf-8")).digest()
