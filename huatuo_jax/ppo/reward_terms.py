"""The settings of a reward that is summed from several terms."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

from huatuo_jax.core.config import operational
from huatuo_jax.reward_functions.grader import GraderConfig

Setting = str | float | bool | None

REWARD_MODEL = "reward_model"
LENGTH = "length"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardTerm:
    """One of the rewards that a response's is summed from.

    Attributes:
        of: the `reward_model`; the `length` of a response in tokens; or a function by name,
            `module:function` or `FILE.py:function`, see `huatuo_jax.reward_functions`.
        name: in metrics and samples; None for the last part of `of`.
        weight: the term is multiplied by this.
        adjusts: the term is no reward by itself, as a penalty of length: it counts only where
            another term, one that does not adjust, applies.
        settings: keyword arguments of the function beside the columns of the prompts.
    """

    of: str = REWARD_MODEL
    name: str | None = None
    weight: float = 1.0
    adjusts: bool = False
    settings: Mapping[str, Setting] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises ValueError for a term with contradicting fields."""
        if not self.is_function and self.of not in (REWARD_MODEL, LENGTH):
            raise ValueError(
                f"of={self.of!r} must be {REWARD_MODEL!r}, {LENGTH!r}, module:function or "
                "FILE.py:function"
            )
        if not math.isfinite(self.weight) or self.weight == 0:
            raise ValueError(f"weight={self.weight!r} must be a number other than 0")
        if self.settings and not self.is_function:
            raise ValueError(f"of={self.of!r} has no settings: they are for functions")
        if self.name is not None and not self.name.isidentifier():
            raise ValueError(f"name={self.name!r} must be a word of letters, digits and _")

    @property
    def is_function(self) -> bool:
        """True for a function, by name."""
        return ":" in self.of

    @property
    def label(self) -> str:
        """Its name in metrics and samples."""
        return self.name or self.of.rpartition(":")[2].rpartition(".")[2]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardMixConfig:
    """A reward that is a weighted sum of terms.

    A term may not apply to a response (a function gives None). Where no term does that is a reward
    by itself, the response has none: it is left out of the mean and the deviation of its group and
    of the rollout, its advantage is 0, and it is counted.

    Attributes:
        terms: what is summed.
        combine: `sum` of the terms as they are; or `sum_of_normalised`: each term less its mean
            over the group of responses to a prompt and divided by its deviation there, so that a
            term of a wide range does not drown the others (GDPO, arXiv 2601.05242).
        most_without: a rollout with a larger share of responses without a reward stops the run.
        grader: the judge that functions ask, see `reward_functions.graded`; None for none.
        verifier_model: directory of a model with a score head that tells functions whether an
            answer is right, with probability 1 / (1 + exp(-score)); or of a classifier in Hugging
            Face format with two labels, the second for right. None for none.
    """

    terms: tuple[RewardTerm, ...] = (RewardTerm(),)
    combine: Literal["sum", "sum_of_normalised"] = "sum"
    most_without: float = 0.5
    grader: GraderConfig | None = None
    verifier_model: str | None = operational(None)

    def __post_init__(self) -> None:
        """Raises ValueError for terms without a sum."""
        names = [one.label for one in self.terms]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"terms: name {twice[0]!r} must be given once; set name")
        if all(one.adjusts for one in self.terms):
            raise ValueError("terms must hold one with adjusts=False")
        if not 0 <= self.most_without <= 1:
            raise ValueError(f"most_without={self.most_without!r} must be from 0 to 1")

    @property
    def has_model(self) -> bool:
        """True where a term is the reward model's score."""
        return any(one.of == REWARD_MODEL for one in self.terms)
