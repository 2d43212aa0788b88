"""Which comparisons to keep, so that no habit of the labels is learnt in place of the content.

All choices are by a hash of the seed and the comparison's id: random, and the same in every run.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

from huatuo_jax.data.records import Comparison, Messages
from huatuo_jax.data.shuffling import key_number

LENGTH = "balance of length"
SOURCE = "balance of source"
TURNS = "balance of turns"

LONGER, SHORTER = "longer answer chosen", "shorter answer chosen"


def length(messages: Messages) -> int:
    """Characters of a continuation's assistant messages."""
    return sum(len(message.content) for message in messages if message.role == "assistant")


def length_group(comparison: Comparison) -> str | None:
    """Whether the longer or the shorter one is chosen; None for equal lengths and for ties."""
    chosen, rejected = length(comparison.chosen), length(comparison.rejected)
    if chosen == rejected or comparison.p_chosen == 0.5:
        return None
    return LONGER if chosen > rejected else SHORTER


def turns_group(comparison: Comparison) -> int:
    """The number of the patient's turns before the answer."""
    return sum(message.role == "user" for message in comparison.messages)


def source_group(comparison: Comparison) -> str:
    """Where the prompt comes from."""
    return comparison.source


_GROUP_OF: Mapping[str, Callable[[Comparison], Hashable]] = {
    SOURCE: source_group,
    TURNS: turns_group,
    LENGTH: length_group,
}


def in_random_order(
    comparisons: Iterable[Comparison], *, seed: int, purpose: str
) -> list[Comparison]:
    """A random order that depends on the seed, the purpose and each comparison's id only."""
    return sorted(comparisons, key=lambda one: (key_number(seed, purpose, one.id), one.id))


def balance(
    comparisons: Sequence[Comparison], *, max_ratios: Mapping[str, float | None], seed: int
) -> tuple[list[Comparison], Counter[str]]:
    """Thins out large groups until all ratios hold at once.

    Args:
        comparisons: with distinct ids.
        max_ratios: for `LENGTH`, `SOURCE` and `TURNS` how many times the smallest group's
            comparisons any group may hold; 1 makes them equal, None leaves them as they are.
        seed: of the choice.

    Returns:
        What is kept, in the order given, and how many were dropped for which balance.

    Raises:
        ValueError: the balance cannot be had without losing a whole group, or one side of the
            lengths has no comparison at all.
    """
    kept, dropped = list(comparisons), Counter[str]()
    wanted = {reason: ratio for reason, ratio in max_ratios.items() if ratio is not None}
    groups = {reason: _sizes(kept, reason).keys() for reason in wanted}
    if kept and LENGTH in wanted and groups[LENGTH] != {LONGER, SHORTER}:
        there = ", ".join(map(str, groups[LENGTH])) or "neither longer nor shorter answers chosen"
        raise ValueError(f"max_length_ratio: nothing to balance with, all comparisons: {there}")
    changed = True
    while changed:
        changed = False
        for reason, ratio in wanted.items():
            sizes = _sizes(kept, reason)
            if lost := groups[reason] - sizes.keys():
                raise ValueError(
                    f"{reason}: no comparison is left of {sorted(map(str, lost))}; allow larger "
                    "ratios, or drop one of the balances"
                )
            smallest = min(sizes.values(), default=0)
            surplus = _surplus(kept, reason, most=int(ratio * smallest), seed=seed)
            if surplus:
                kept = [one for one in kept if one.id not in surplus]
                dropped[reason] += len(surplus)
                changed = True
    return kept, dropped


def _sizes(comparisons: Iterable[Comparison], reason: str) -> Counter[Hashable]:
    return Counter(group for one in comparisons if (group := _GROUP_OF[reason](one)) is not None)


def _surplus(comparisons: Sequence[Comparison], reason: str, *, most: int, seed: int) -> set[str]:
    """The ids over the limit of each group, the last ones of the random order."""
    members: dict[Hashable, list[str]] = defaultdict(list)
    for one in in_random_order(comparisons, seed=seed, purpose=reason):
        if (group := _GROUP_OF[reason](one)) is not None:
            members[group].append(one.id)
    return {one for ids in members.values() for one in ids[most:]}
