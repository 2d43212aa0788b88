"""What the pipeline holds of a dialogue once it is tokens, and who makes it so.

This is the seam between templates and packing: packing, mixture and batches know examples only,
and a `DialogueTokenizer` is all that they need of a template and its tokenizer.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from huatuo_jax.data.records import KINDS, Messages

TokenIds = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]

DropReason = Literal["too long", "cannot be rendered", "nothing to train"]

UNKNOWN_KIND = "unknown"
"""The kind of a dialogue whose source names none."""

ALL_KINDS: tuple[str, ...] = (*KINDS, UNKNOWN_KIND)
"""Every kind there is; a kind id is an index into these, in every dataset."""


@dataclass(frozen=True, slots=True)
class Example:
    """One dialogue as tokens.

    `trained_mask[t]` belongs to the token that is predicted: it says that token t is learned from
    the tokens before it. `kind` is one of `ALL_KINDS`.
    """

    token_ids: TokenIds
    trained_mask: Mask
    kind: str
    id: str

    @property
    def kind_id(self) -> int:
        """The kind as an index into `ALL_KINDS`."""
        return ALL_KINDS.index(self.kind)

    def __post_init__(self) -> None:
        """Refuses an unknown kind, and arrays that are not one vector each, of one length."""
        if self.kind not in ALL_KINDS:
            raise ValueError(
                f"example {self.id!r}: kind {self.kind!r} should be one of {ALL_KINDS}"
            )
        if self.token_ids.ndim != 1 or self.token_ids.shape != self.trained_mask.shape:
            raise ValueError(
                f"example {self.id!r}: token_ids {self.token_ids.shape} and trained_mask "
                f"{self.trained_mask.shape} should be vectors of one length"
            )


class Tokens(NamedTuple):
    """A dialogue's ids and mask, and how many of its messages went to make it fit."""

    token_ids: TokenIds
    trained_mask: Mask
    num_messages_dropped: int = 0


class Dropped(NamedTuple):
    """A dialogue that becomes no example: the reason drops are counted by, and what is its own."""

    reason: DropReason
    detail: str


class DialogueTokenizer(Protocol):
    """Turns messages into tokens; it is sent to other processes, so it has to pickle."""

    @property
    def identity(self) -> str:
        """Everything the ids depend on: two tokenizers of one identity give the same ids."""
        ...

    def __call__(self, messages: Messages) -> Tokens | Dropped:
        """Returns the tokens of a dialogue, or why there are none."""
        ...


def num_trained(trained_mask: Mask) -> int:
    """The number of tokens a loss is taken of: the first token has nothing to be predicted from."""
    return int(np.count_nonzero(trained_mask[1:]))
