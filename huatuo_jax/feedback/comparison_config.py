"""The policies by which judgements become comparisons."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from huatuo_jax.feedback.judgements import CRITERIA, PROTOCOLS, Protocol


@dataclass(frozen=True, kw_only=True)
class MixedFile:
    """Other comparisons to mix in, such as general-domain preferences.

    Their margins are left out, because those are in another unit.

    Attributes:
        path: a file in any format that `huatuo_jax.data.readers.read_comparisons` knows.
        limit: at most so many, a random but fixed choice; None for all.
        per_own: at most so many for each comparison of our own; None for no such bound.
    """

    path: str
    limit: int | None = None
    per_own: float | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for amounts that are not positive."""
        for name in ("limit", "per_own"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"mix.{name} is {value}; it should be above 0")


@dataclass(frozen=True, kw_only=True)
class ComparisonConfig:
    """How judgements become comparisons.

    Attributes:
        judge: whose judgements; None where the labels hold one judge.
        template: made with which template, its hash; None where the labels hold one.
        protocol: "score" or "pairwise"; None where the labels hold one.
        criterion: the score that decides.
        tie_margin: scores that differ by no more than this are a tie.
        ties: "drop" leaves a tie out, "half" keeps it with a probability of 0.5. Two orders whose
            verdict is 0.5 both are a tie too.
        disagreement: votes of the two orders that contradict each other, kept as "half" or
            "drop"ped. Probabilities need no such policy: the mean of their log-odds is the label.
        max_pairs_per_prompt: a random but fixed choice of so many; None for all.
        max_length_ratio: the longer answer may win at most so many times as often as the shorter
            one, and the other way round; 1 for equal, None for no balance.
        max_source_ratio: the same for the sources of the prompts, largest over smallest.
        max_turns_ratio: the same for the numbers of the patient's turns.
        mix: other comparisons, mixed in after the balance.
        seed: of all random choices.
    """

    judge: str | None = None
    template: str | None = None
    protocol: Protocol | None = None
    criterion: str = "overall"
    tie_margin: float = 0.0
    ties: Literal["drop", "half"] = "drop"
    disagreement: Literal["half", "drop"] = "half"
    max_pairs_per_prompt: int | None = None
    max_length_ratio: float | None = None
    max_source_ratio: float | None = None
    max_turns_ratio: float | None = None
    mix: tuple[MixedFile, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ValueError for a field that cannot be."""
        choices: Mapping[str, Sequence[str | None]] = {
            "protocol": (None, *PROTOCOLS),
            "criterion": CRITERIA,
            "ties": ("drop", "half"),
            "disagreement": ("half", "drop"),
        }
        for name, known in choices.items():
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name} is {value!r}; it should be one of {known}")
        if not 0 <= self.tie_margin < math.inf:
            raise ValueError(f"tie_margin is {self.tie_margin}; it should be 0 or above")
        if self.max_pairs_per_prompt is not None and self.max_pairs_per_prompt < 1:
            raise ValueError(
                f"max_pairs_per_prompt is {self.max_pairs_per_prompt}; it should be at least 1"
            )
        for name in ("max_length_ratio", "max_source_ratio", "max_turns_ratio"):
            ratio = getattr(self, name)
            if ratio is not None and not 1 <= ratio < math.inf:
                raise ValueError(f"{name} is {ratio}; it should be at least 1")
