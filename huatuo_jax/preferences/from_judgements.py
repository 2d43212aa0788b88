"""Makes preference pairs from judgements, balances them, and mixes in pairs of other files.

Pairs are ordered by id and never by arrival, so that a run with retries trains on the same file. A
failed judgement never becomes a number, and everything left out is counted by its reason. All
choices are by a hash of the seed and the pair's id: random, but the same in every run.
"""

import dataclasses
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from huatuo_jax.core.files import write_rows
from huatuo_jax.data.mixture import key_number
from huatuo_jax.data.readers import read_comparisons
from huatuo_jax.data.records import Comparison, Messages, same_answer
from huatuo_jax.data.records import answer as continuation
from huatuo_jax.judge.judgements import CRITERIA, PROTOCOLS, Judgement, Protocol, current
from huatuo_jax.judge.questions import (
    FAILED,
    Answered,
    PairKey,
    answer_scores,
    matching,
    one_judge,
    pair_verdicts,
    pairs_of,
    probability,
)


@dataclass(frozen=True, kw_only=True)
class MixedFile:
    """Preference pairs of another file to mix in, such as general-domain ones.

    Their margins are left out, because they have another unit.

    Attributes:
        path: a file in any format that `huatuo_jax.data.readers.read_comparisons` reads.
        limit: largest number of pairs, a random but fixed choice; None for all.
        per_own: largest number for each pair of our own; None for no such bound.
    """

    path: str
    limit: int | None = None
    per_own: float | None = None

    def __post_init__(self) -> None:
        """Validates that the amounts are positive."""
        for name in ("limit", "per_own"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"mix.{name} is {value}; it should be above 0")


@dataclass(frozen=True, kw_only=True)
class ComparisonConfig:
    """The policies by which judgements become preference pairs.

    Attributes:
        judge: name of the judge; None where the labels hold one judge.
        template: hash of the judge's template; None where the labels hold one.
        protocol: "score" or "pairwise"; None where the labels hold one.
        criterion: the score that decides.
        score_scale: scores give soft labels: the probability that an answer is the better one is
            sigmoid(difference of scores / score_scale), that of Bradley and Terry for scores in
            units of it (the target of RPO, arXiv 2406.11704, whose eta is 1 / score_scale). None
            for 1, however little the scores differ.
        tie_margin: scores that differ by no more than this are a tie.
        ties: "drop" leaves a tie out, "half" keeps it with a probability of 0.5. Two orders that
            both give 0.5 are a tie too.
        disagreement: votes of the two orders that contradict each other are kept as "half" or
            "drop"ped. Probabilities need no such policy: the mean of their log-odds is the label.
        max_pairs_per_prompt: a random but fixed choice of this many; None for all.
        max_length_ratio: the longer answer may win at most this many times as often as the shorter
            one, and vice versa; 1 for equal, None for no balance.
        max_source_ratio: the same for the sources of the prompts, largest over smallest.
        max_turns_ratio: the same for the number of the user's turns.
        mix: pairs of other files, mixed in after the balance.
        seed: of all random choices.
    """

    judge: str | None = None
    template: str | None = None
    protocol: Protocol | None = None
    criterion: str = "overall"
    score_scale: float | None = None
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
        """Validates the fields."""
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
        if self.score_scale is not None and not 0 < self.score_scale < math.inf:
            raise ValueError(f"score_scale is {self.score_scale}; it should be above 0")
        if self.max_pairs_per_prompt is not None and self.max_pairs_per_prompt < 1:
            raise ValueError(
                f"max_pairs_per_prompt is {self.max_pairs_per_prompt}; it should be at least 1"
            )
        for name in ("max_length_ratio", "max_source_ratio", "max_turns_ratio"):
            ratio = getattr(self, name)
            if ratio is not None and not 1 <= ratio < math.inf:
                raise ValueError(f"{name} is {ratio}; it should be at least 1")


LENGTH = "balance of length"
SOURCE = "balance of source"
TURNS = "balance of turns"

LONGER, SHORTER = "longer answer chosen", "shorter answer chosen"


def length(messages: Messages) -> int:
    """Counts the characters of a continuation's assistant messages."""
    return sum(len(message.content) for message in messages if message.role == "assistant")


def length_group(comparison: Comparison) -> str | None:
    """Returns the group by the longer answer; None for equal lengths and for ties."""
    chosen, rejected = length(comparison.chosen), length(comparison.rejected)
    if chosen == rejected or comparison.p_chosen == 0.5:
        return None
    return LONGER if chosen > rejected else SHORTER


def turns_group(comparison: Comparison) -> int:
    """Counts the user's turns before the answer."""
    return sum(message.role == "user" for message in comparison.messages)


def source_group(comparison: Comparison) -> str:
    """Returns the prompt's source."""
    return comparison.source


_GROUP_OF: Mapping[str, Callable[[Comparison], Hashable]] = {
    SOURCE: source_group,
    TURNS: turns_group,
    LENGTH: length_group,
}


def in_random_order(
    comparisons: Iterable[Comparison], *, seed: int, purpose: str
) -> list[Comparison]:
    """Orders pairs at random, depending only on the seed, the purpose and each pair's id."""
    return sorted(comparisons, key=lambda one: (key_number(seed, purpose, one.id), one.id))


def balance(
    comparisons: Sequence[Comparison], *, max_ratios: Mapping[str, float | None], seed: int
) -> tuple[list[Comparison], Counter[str]]:
    """Drops pairs of large groups until all ratios hold at once.

    Args:
        comparisons: with distinct ids.
        max_ratios: for `LENGTH`, `SOURCE` and `TURNS` the largest ratio of any group's size to the
            smallest group's; 1 makes them equal, None leaves them as they are.
        seed: of the choice.

    Returns:
        The kept pairs, in the order given, and the number dropped for each balance.

    Raises:
        ValueError: the balance would drop a whole group, or one side of the lengths has no pair.
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
    """Returns the ids above each group's limit, the last ones of the random order."""
    members: dict[Hashable, list[str]] = defaultdict(list)
    for one in in_random_order(comparisons, seed=seed, purpose=reason):
        if (group := _GROUP_OF[reason](one)) is not None:
            members[group].append(one.id)
    return {one for ids in members.values() for one in ids[most:]}


REPEATED = "the same id again"
ERROR = "error in its row"
OVER_LIMIT = "over its limit"


def read_mixed(
    files: Sequence[MixedFile], *, num_own: int, seed: int
) -> tuple[list[Comparison], dict[str, int], dict[str, int]]:
    """Reads pairs of other files, with counts of each file and of those left out by reason.

    Their ids are prefixed by the source's name.

    Args:
        files: paths and amounts.
        num_own: number of our own pairs, for `MixedFile.per_own`.
        seed: of the choice.

    Raises:
        ValueError: a file is missing, holds no preference pairs, or too many bad rows.
    """
    taken: list[Comparison] = []
    mixed: dict[str, int] = {}
    left_out = Counter[str]()
    for one in files:
        reading = read_comparisons(one.path)
        found = {}
        for comparison in reading:
            if comparison.id in found:
                left_out[REPEATED] += 1
                continue
            found[comparison.id] = dataclasses.replace(
                comparison, id=f"{comparison.source}/{comparison.id}", margin=None
            )
        left_out[ERROR] += len(reading.errors)
        left_out.update(reading.exclusions)
        bounds = [
            len(found),
            len(found) if one.limit is None else one.limit,
            len(found) if one.per_own is None else int(one.per_own * num_own),
        ]
        ordered = in_random_order(found.values(), seed=seed, purpose="mix")
        kept = ordered[: min(bounds)]
        left_out[OVER_LIMIT] += len(ordered) - len(kept)
        mixed[one.path] = len(kept)
        taken += kept
    return taken, mixed, dict(+left_out)


NOT_JUDGED = "not judged"
JUDGEMENT_FAILED = "a judgement of the pair failed"
ONE_ORDER = "judged in one order only"
SAME_TEXT = "both answers are the same text"
TIE = "tie"
DISAGREEMENT = "the two orders disagree"
MAX_PAIRS = "more pairs of the prompt than max_pairs_per_prompt"

# Fields of an answers record that concern all answers and not two.
_NOT_CARRIED = ("answers",)


@dataclass(frozen=True, kw_only=True)
class ComparisonReport:
    """Counts of judgements and pairs by their use.

    `num_judgements` is the sum of those used and of `judgements_left_out`; `num_pairs`, all pairs
    of the prompts' answers, the sum of `num_own` and of `pairs_left_out`; `num_comparisons` the sum
    of `num_own` and of `mixed`.
    """

    judge: str
    protocol: Protocol
    num_judgements: int
    judgements_left_out: Mapping[str, int]
    num_pairs: int
    pairs_left_out: Mapping[str, int]
    num_own: int
    mixed: Mapping[str, int]
    mixed_left_out: Mapping[str, int]
    num_comparisons: int

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as plain values."""
        return dataclasses.asdict(self)

    def text(self) -> str:
        """Returns the report as a few lines of text."""
        lines = [
            f"{self.num_comparisons} comparisons from {self.judge} ({self.protocol})",
            f"  judgements: {self.num_judgements}; left out: {_counts(self.judgements_left_out)}",
            f"  pairs: {self.num_pairs}; kept: {self.num_own}; "
            f"left out: {_counts(self.pairs_left_out)}",
        ]
        if self.mixed or self.mixed_left_out:
            left_out = _counts(self.mixed_left_out)
            lines.append(f"  mixed in: {_counts(self.mixed)}; left out: {left_out}")
        return "\n".join(lines)


class _Label(NamedTuple):
    """A verdict on a pair; `margin` is the score of `one` minus that of `other`."""

    p_one: float
    margin: float | None


def make_comparisons(
    judgements: Iterable[Judgement], answered: Iterable[Answered], cfg: ComparisonConfig
) -> tuple[list[Comparison], ComparisonReport]:
    """Makes all preference pairs that judgements of answers give, ordered by id.

    Args:
        judgements: in any order; superseded ones may be among them.
        answered: the prompts with their answers, as the judge saw them.
        cfg: the policies.

    Raises:
        ValueError: two prompts of one id; several kinds of judgements and no choice between them;
            `score_scale` without scores; no judgement of these texts at all; an impossible balance;
            an unreadable file to mix in.
    """
    by_id = _by_id(answered)
    standing = current(judgements)
    chosen = one_judge(standing, judge=cfg.judge, template=cfg.template, protocol=cfg.protocol)
    fitting, others = matching(chosen, by_id)
    if not fitting:
        raise ValueError(
            f"none of the {len(chosen)} judgements is of these answers: {_counts(_reasons(others))}"
        )
    left_out = _reasons(others)
    left_out.update(FAILED for one in fitting if one.failed)
    protocol = fitting[0].protocol
    if protocol != "score" and cfg.score_scale is not None:
        raise ValueError(f"score_scale is for scores; these judgements are {protocol}")
    label_of = _score_labels(fitting, cfg) if protocol == "score" else _vote_labels(fitting, cfg)
    provenance = {"judge": fitting[0].judge, "template": fitting[0].template}
    kept: list[Comparison] = []
    dropped = Counter[str]()
    num_pairs = 0
    for prompt_id in sorted(by_id):
        found, reasons = _of_prompt(by_id[prompt_id], label_of, provenance, cfg)
        num_pairs += len(found) + reasons.total()
        kept += found
        dropped += reasons
    ratios = {
        LENGTH: cfg.max_length_ratio,
        SOURCE: cfg.max_source_ratio,
        TURNS: cfg.max_turns_ratio,
    }
    kept, thinned = balance(kept, max_ratios=ratios, seed=cfg.seed)
    foreign, mixed, mixed_left_out = read_mixed(cfg.mix, num_own=len(kept), seed=cfg.seed)
    comparisons = sorted((*kept, *foreign), key=lambda one: one.id)
    _check_ids(comparisons)
    report = ComparisonReport(
        judge=fitting[0].judge,
        protocol=protocol,
        num_judgements=len(chosen),
        judgements_left_out=dict(left_out),
        num_pairs=num_pairs,
        pairs_left_out=dict(dropped + thinned),
        num_own=len(kept),
        mixed=mixed,
        mixed_left_out=mixed_left_out,
        num_comparisons=len(comparisons),
    )
    return comparisons, report


def write_comparisons(path: str | os.PathLike[str], comparisons: Iterable[Comparison]) -> None:
    """Writes the file completely or not at all, replacing an existing one."""
    write_rows(path, (one.to_json() for one in comparisons))


def _of_prompt(
    answered: Answered,
    label_of: Callable[[PairKey], _Label | str],
    provenance: Mapping[str, str],
    cfg: ComparisonConfig,
) -> tuple[list[Comparison], Counter[str]]:
    """Returns the pairs of one prompt, and the reasons why other pairs are left out."""
    prompt, texts = answered.prompt, answered.answers
    found, reasons = [], Counter[str]()
    for key in pairs_of(prompt.id, len(texts)):
        same = same_answer(continuation(texts[key.one]), continuation(texts[key.other]))
        label = SAME_TEXT if same else label_of(key)
        if isinstance(label, str):
            reasons[label] += 1
        else:
            found.append(_comparison(answered, key, label, provenance))
    if cfg.max_pairs_per_prompt is not None and len(found) > cfg.max_pairs_per_prompt:
        reasons[MAX_PAIRS] += len(found) - cfg.max_pairs_per_prompt
        found = in_random_order(found, seed=cfg.seed, purpose=MAX_PAIRS)
        found = found[: cfg.max_pairs_per_prompt]
    return found, reasons


def _score_labels(
    judgements: Sequence[Judgement], cfg: ComparisonConfig
) -> Callable[[PairKey], _Label | str]:
    scores = answer_scores(judgements, criterion=cfg.criterion)
    asked = {(one.id, one.answers[0]) for one in judgements}

    def label_of(key: PairKey) -> _Label | str:
        places = [(key.id, key.one), (key.id, key.other)]
        if not all(place in asked for place in places):
            return NOT_JUDGED
        if not all(place in scores for place in places):
            return JUDGEMENT_FAILED
        margin = scores[places[0]] - scores[places[1]]
        if abs(margin) > cfg.tie_margin:
            scale = cfg.score_scale
            return _Label(
                float(margin > 0) if scale is None else probability(margin / scale), margin
            )
        return TIE if cfg.ties == "drop" else _Label(0.5, margin)

    return label_of


def _vote_labels(
    judgements: Sequence[Judgement], cfg: ComparisonConfig
) -> Callable[[PairKey], _Label | str]:
    verdicts = pair_verdicts(judgements)
    asked = {(one.id, one.answers) for one in judgements}

    def label_of(key: PairKey) -> _Label | str:
        orders = [(key.id, (key.one, key.other)), (key.id, (key.other, key.one))]
        if not any(order in asked for order in orders):
            return NOT_JUDGED
        if key not in verdicts or not verdicts[key].both_orders:
            return JUDGEMENT_FAILED if all(order in asked for order in orders) else ONE_ORDER
        combined = verdicts[key].combined()
        if combined.voted and combined.contradicts:
            return DISAGREEMENT if cfg.disagreement == "drop" else _Label(0.5, None)
        if combined.p_one == 0.5 and cfg.ties == "drop":
            return TIE
        return _Label(combined.p_one, None)

    return label_of


def _comparison(
    answered: Answered, key: PairKey, label: _Label, provenance: Mapping[str, str]
) -> Comparison:
    """Makes a pair: the more likely answer is chosen, of a tie the first one."""
    prompt, texts = answered.prompt, answered.answers
    one_wins = label.p_one >= 0.5
    better, worse = (key.one, key.other) if one_wins else (key.other, key.one)
    extra = {name: value for name, value in prompt.extra.items() if name not in _NOT_CARRIED}
    return Comparison(
        id=f"{prompt.id}:{better}-{worse}",
        messages=prompt.messages,
        chosen=continuation(texts[better]),
        rejected=continuation(texts[worse]),
        source=prompt.source,
        p_chosen=label.p_one if one_wins else 1.0 - label.p_one,
        margin=label.margin if label.margin is None or one_wins else -label.margin,
        extra={
            **extra,
            **provenance,
            "chosen_answer": better,
            "rejected_answer": worse,
            **answered.sampled_fields(better, prefix="chosen_"),
            **answered.sampled_fields(worse, prefix="rejected_"),
        },
    )


def _by_id(answered: Iterable[Answered]) -> dict[str, Answered]:
    by_id: dict[str, Answered] = {}
    for item in answered:
        if item.prompt.id in by_id:
            raise ValueError(f"the answers hold the prompt {item.prompt.id!r} twice")
        by_id[item.prompt.id] = item
    return by_id


def _check_ids(comparisons: Sequence[Comparison]) -> None:
    repeated = [name for name, count in Counter(one.id for one in comparisons).items() if count > 1]
    if repeated:
        raise ValueError(
            f"comparison {repeated[0]!r} is repeated; does mix name a file or a source twice?"
        )


def _reasons(left_out: Iterable[tuple[Judgement, str]]) -> Counter[str]:
    return Counter(reason for _, reason in left_out)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items()) or "none"
