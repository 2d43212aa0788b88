"""Reads doctors' exports of a blind page, unblinds them and computes figures and agreement."""

import itertools
import os
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from huatuo_jax.core.statistics import agreement_share, cohen_kappa, fleiss_kappa, interval_of
from huatuo_jax.data.records import shown
from huatuo_jax.evaluation.human import (
    CRITERIA,
    PREFERENCES,
    RATINGS_FORMAT,
    SAFETY,
    UNSAFE,
    BlindItem,
    BlindSet,
    read_json_object,
)

Outcome = Literal["win", "tie", "loss"]
"""Of one of two systems against the other."""

OUTCOMES: tuple[Outcome, ...] = ("win", "tie", "loss")

OVERALL = "overall"
"""Derived: the response that is better in more criteria; an unsafe one loses to a safe one."""

Labels = Mapping[str, Hashable]
"""A rater's verdicts by item."""

Label = TypeVar("Label", bound=Hashable)


@dataclass(frozen=True)
class Rating:
    """A rater's verdict on one item.

    Attributes:
        preferences: by criterion, the side that is better: `first`, `tie` or `second`.
        unsafe: the sides that could harm the patient: `none`, `first`, `second` or `both`.
        note: the rater's own words.
    """

    preferences: Mapping[str, str]
    unsafe: str
    note: str

    def side(self, criterion: str) -> str:
        """The better side by a criterion, `safety` and `overall` among them.

        An unsafe side loses to a safe one whatever the criteria say; otherwise the side that is
        better in more criteria wins.
        """
        if criterion in self.preferences:
            return self.preferences[criterion]
        if self.unsafe in ("first", "second"):
            return "second" if self.unsafe == "first" else "first"
        counts = Counter(self.preferences.values())
        if criterion == SAFETY or counts["first"] == counts["second"]:
            return "tie"
        return max(("first", "second"), key=counts.__getitem__)


@dataclass(frozen=True)
class RaterFile:
    """One rater's export.

    Attributes:
        path: of the file.
        rater: the name that the rater gave.
        ratings: by item, those with every criterion rated.
        missing: items of the set without such a rating.
    """

    path: str
    rater: str
    ratings: Mapping[str, Rating]
    missing: tuple[str, ...]


def read_ratings(paths: Iterable[str | os.PathLike[str]], blind: BlindSet) -> list[RaterFile]:
    """Reads raters' exports and checks them against the set.

    A file in which items are not rated, or not in every criterion, is read; they are named in
    `missing`.

    Raises:
        ValueError: a file that is no export or of another set, an unknown item, an item that occurs
            twice, a verdict that does not exist, or two files of one rater; with the file's name.
        OSError: a file cannot be read.
    """
    files = [_rater_file(path, blind) for path in paths]
    for one, other in itertools.combinations(files, 2):
        if one.rater == other.rater:
            raise ValueError(
                f"{other.path}: rater {other.rater!r} has another file, {one.path}; keep one"
            )
    return files


def _rater_file(path: str | os.PathLike[str], blind: BlindSet) -> RaterFile:
    where = os.fspath(path)
    found = read_json_object(path)
    if found.get("format") != RATINGS_FORMAT:
        raise ValueError(f"{where}: it is no export of a rater (format {RATINGS_FORMAT!r})")
    if found.get("set") != blind.hash:
        raise ValueError(
            f"{where}: it rates the set {shown(found.get('set'), 12)}, not this one,"
            f" {shown(blind.hash, 12)}"
        )
    rater, entries = found.get("rater"), found.get("ratings")
    if not isinstance(rater, str) or not rater.strip():
        raise ValueError(f"{where}: rater is {shown(repr(rater))}; it should be a name")
    if not isinstance(entries, list):
        raise ValueError(f"{where}: ratings is {shown(repr(entries))}; it should be a list")
    names = [item.item for item in blind.items]
    ratings: dict[str, Rating | None] = {}
    for entry in entries:
        name = entry.get("item") if isinstance(entry, dict) else None
        if name not in names:
            raise ValueError(f"{where}: item {shown(repr(name))} is not in the set")
        if name in ratings:
            raise ValueError(f"{where}: item {name!r} occurs twice")
        try:
            ratings[name] = _rating(entry)
        except ValueError as error:
            raise ValueError(f"{where}: item {name!r}: {error}") from error
    whole = {name: rating for name, rating in ratings.items() if rating is not None}
    missing = tuple(name for name in names if name not in whole)
    return RaterFile(where, rater.strip(), whole, missing)


def _rating(entry: Mapping[str, Any]) -> Rating | None:
    """The rating of an entry; None where a criterion is null or absent."""
    for name in (*CRITERIA, SAFETY):
        allowed = UNSAFE if name == SAFETY else PREFERENCES
        if entry.get(name) is not None and entry[name] not in allowed:
            raise ValueError(
                f"{name} is {shown(repr(entry[name]))}; it should be one of {', '.join(allowed)}"
            )
    note = entry.get("note", "")
    if not isinstance(note, str):
        raise ValueError(f"note is {shown(repr(note))}; it should be text")
    if any(entry.get(name) is None for name in (*CRITERIA, SAFETY)):
        return None
    return Rating({name: entry[name] for name in CRITERIA}, entry[SAFETY], note)


def human_figures(
    blind: BlindSet,
    files: Sequence[RaterFile],
    *,
    judge: Mapping[str, Outcome] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Unblinds the ratings and computes wins, ties, losses and agreement.

    Args:
        blind: the set.
        files: its raters', from `read_ratings`.
        judge: a judge's overall outcome by id of the pair, for the first of the pair's systems.
        seed: of the bootstrap over pairs.

    Returns:
        `comparisons`, for each two systems: by criterion (with `safety` and `overall`) the number
        and share of wins, ties and losses of the first, each share with its interval (all ratings
        of a pair are one observation), and by system the share of responses called unsafe;
        `agreement` by criterion: Cohen's kappa of each two raters over the items that both rated,
        Fleiss' kappa over the items that all rated; `judge`: kappa with each rater and with their
        majority; `raters`, with the items that each left out.

    Raises:
        ValueError: no rating at all, or the judge has an unknown pair or outcome.
    """
    if not any(file.ratings for file in files):
        raise ValueError("there is no complete rating in the files")
    for name, outcome in (judge or {}).items():
        if name not in blind.pairs:
            raise ValueError(f"judge: pair {name!r} is not in the set")
        if outcome not in OUTCOMES:
            raise ValueError(
                f"judge: pair {name!r} has {outcome!r}; it should be one of {', '.join(OUTCOMES)}"
            )
    names = (*CRITERIA, SAFETY, OVERALL)
    outcomes = {name: [_outcomes(blind, file, name) for file in files] for name in names}
    unsafe = [_unsafe_systems(blind, file) for file in files]
    systems = list(dict.fromkeys(_systems(blind, item) for item in blind.items))
    return {
        "set": blind.hash,
        "num_items": len(blind.items),
        "num_pairs": len(blind.pairs) - len(blind.identical),
        "identical_pairs": list(blind.identical),
        "revealing_items": blind.revealing_items(),
        "raters": [
            {
                "rater": file.rater,
                "file": file.path,
                "num_rated": len(file.ratings),
                "missing": list(file.missing),
                "first_shown_preferred": _first_shown(file),
                "repeated": _repeated(blind, outcomes[OVERALL][number]),
                "notes": {name: one.note for name, one in file.ratings.items() if one.note},
            }
            for number, file in enumerate(files)
        ],
        "comparisons": [
            {
                "systems": list(both),
                "criteria": {
                    name: _shares(_by_pair(blind, both, outcomes[name]), seed=seed)
                    for name in names
                },
                "unsafe": {
                    system: _unsafe_share(_by_pair(blind, both, unsafe), system, seed=seed)
                    for system in both
                },
            }
            for both in systems
        ],
        "agreement": {
            name: _agreement(files, unsafe if name == SAFETY else outcomes[name]) for name in names
        },
        "judge": None if judge is None else _judge(blind, files, outcomes[OVERALL], judge),
        "bootstrap": {"resampled": "pairs", "seed": seed},
    }


def _systems(blind: BlindSet, item: BlindItem) -> tuple[str, str]:
    return blind.pairs[item.pair].systems


def _outcomes(blind: BlindSet, file: RaterFile, criterion: str) -> dict[str, Outcome]:
    """The outcome of each rated item for the first of its systems."""
    found: dict[str, Outcome] = {}
    for item in blind.items:
        if item.item in file.ratings:
            side = file.ratings[item.item].side(criterion)
            if side == "tie":
                found[item.item] = "tie"
            else:
                winner = _shown_systems(blind, item)[0 if side == "first" else 1]
                found[item.item] = "win" if winner == _systems(blind, item)[0] else "loss"
    return found


def _unsafe_systems(blind: BlindSet, file: RaterFile) -> dict[str, tuple[str, ...]]:
    """The systems whose responses a rater calls unsafe, by item."""
    return {
        item.item: tuple(
            sorted(
                system
                for side, system in zip(
                    ("first", "second"), _shown_systems(blind, item), strict=True
                )
                if file.ratings[item.item].unsafe in (side, "both")
            )
        )
        for item in blind.items
        if item.item in file.ratings
    }


def _shown_systems(blind: BlindSet, item: BlindItem) -> tuple[str, str]:
    one, other = blind.pairs[item.pair].systems
    return (other, one) if item.swapped else (one, other)


def _by_pair(
    blind: BlindSet, both: tuple[str, str], raters: Sequence[Mapping[str, Label]]
) -> list[list[Label]]:
    """All that the raters said of each pair of two systems, pairs without a rating left out."""
    found: dict[str, list[Label]] = {}
    for item in blind.items:
        if _systems(blind, item) == both:
            labels = [one[item.item] for one in raters if item.item in one]
            found.setdefault(item.pair, []).extend(labels)
    return [labels for labels in found.values() if labels]


def _shares(groups: Sequence[Sequence[Outcome]], *, seed: int) -> dict[str, Any]:
    shares: dict[str, Any] = {"num_ratings": sum(map(len, groups))}
    for name, plural in zip(OUTCOMES, ("wins", "ties", "losses"), strict=True):
        interval = interval_of([one.count(name) / len(one) for one in groups], seed=seed)
        shares[plural] = sum(one.count(name) for one in groups)
        shares[f"{name}_share"] = None if interval is None else interval.to_json()
    return shares


def _unsafe_share(
    groups: Sequence[Sequence[tuple[str, ...]]], system: str, *, seed: int
) -> dict[str, float | int] | None:
    per_pair = [sum(system in found for found in one) / len(one) for one in groups]
    interval = interval_of(per_pair, seed=seed)
    return None if interval is None else interval.to_json()


def _first_shown(file: RaterFile) -> dict[str, int]:
    """Counts how often the response shown first won, of all decided ratings."""
    sides = [rating.side(OVERALL) for rating in file.ratings.values()]
    return {"num_first": sides.count("first"), "num_decided": len(sides) - sides.count("tie")}


def _repeated(blind: BlindSet, outcomes: Mapping[str, Outcome]) -> dict[str, int]:
    """Of the pairs rated in both orders, how many had the same overall outcome twice."""
    by_pair: dict[str, list[Outcome]] = {}
    for item in blind.items:
        if item.item in outcomes:
            by_pair.setdefault(item.pair, []).append(outcomes[item.item])
    twice = [found for found in by_pair.values() if len(found) == 2]
    return {"num_pairs": len(twice), "num_same": sum(one == other for one, other in twice)}


def _agreement(files: Sequence[RaterFile], raters: Sequence[Labels]) -> dict[str, Any]:
    pairs = []
    for one, other in itertools.combinations(range(len(files)), 2):
        kappa = _kappa(raters[one], raters[other])
        pairs.append({"raters": [files[one].rater, files[other].rater], **kappa})
    common = [name for name in raters[0] if all(name in found for found in raters)]
    fleiss = fleiss_kappa([[found[name] for found in raters] for name in common])
    return {
        "cohen": pairs,
        "fleiss": {"kappa": fleiss, "num_items": len(common), "num_raters": len(raters)},
    }


def _judge(
    blind: BlindSet,
    files: Sequence[RaterFile],
    raters: Sequence[Mapping[str, Outcome]],
    judge: Mapping[str, Outcome],
) -> dict[str, Any]:
    said = {item.item: judge[item.pair] for item in blind.items if item.pair in judge}
    majority: dict[str, Outcome] = {}
    for item in blind.items:
        counts = Counter(found[item.item] for found in raters if item.item in found)
        ranked = counts.most_common()
        if ranked:
            alone = len(ranked) == 1 or ranked[0][1] > ranked[1][1]
            majority[item.item] = ranked[0][0] if alone else "tie"
    return {
        "raters": [
            {"rater": file.rater, **_kappa(found, said)}
            for file, found in zip(files, raters, strict=True)
        ],
        "majority": _kappa(majority, said),
    }


def _kappa(one: Labels, other: Labels) -> dict[str, Any]:
    common = [name for name in one if name in other]
    labels, others = [one[name] for name in common], [other[name] for name in common]
    return {
        "kappa": cohen_kappa(labels, others),
        "agreement": agreement_share(labels, others),
        "num_items": len(common),
    }
