"""Delta weights: a model published as its difference from a base that may not be passed on.

HuatuoGPT-13B is one, over Ziya-LLaMA-13B: to every tensor the base is added, except to those whose
shape or meaning the fine-tuning changed, which are published whole.
"""

import dataclasses
import pathlib
import re

import numpy as np

from huatuo_jax.checkpoint.hf_load import Tensors

_PUBLISHED_WHOLE = re.compile(r"(^|\.)(embed_tokens\.weight|lm_head\.weight|rotary_emb\.inv_freq)$")


@dataclasses.dataclass(frozen=True)
class DeltaSource:
    """The tensors of base plus delta, each summed when it is read: no model is ever whole here.

    Sums are taken in float32 and rounded to the delta's dtype, which is the sum in that dtype.
    """

    delta: Tensors
    base: Tensors

    def __post_init__(self) -> None:
        """Raise ValueError where the two do not belong together, before anything is read."""
        for name in self.delta.names():
            if _PUBLISHED_WHOLE.search(name):
                continue
            if name not in self.base.names():
                raise ValueError(f"{self.base.folder}: the base lacks {name} of the delta")
            if self.base.shape(name) != self.delta.shape(name):
                raise ValueError(
                    f"{self.base.folder}: {name} is {self.base.shape(name)} in the base, "
                    f"{self.delta.shape(name)} in the delta: not the base of this delta"
                )

    @property
    def folder(self) -> pathlib.Path:
        """The delta's folder."""
        return self.delta.folder

    def names(self) -> tuple[str, ...]:
        """Name every tensor of the delta."""
        return self.delta.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Tell the shape of a tensor."""
        return self.delta.shape(name)

    def dtype(self, name: str) -> np.dtype:
        """Tell the dtype of a tensor, which is the delta's."""
        return self.delta.dtype(name)

    def read(self, name: str) -> np.ndarray:
        """Read one tensor of the sum into a new array."""
        difference = self.delta.read(name)
        if _PUBLISHED_WHOLE.search(name):
            return difference
        total = difference.astype(np.float32) + self.base.read(name).astype(np.float32)
        return total.astype(difference.dtype)
