"""Comparisons out of judgements, for the reward model.

They are ordered by id and never by arrival, so that a run with retries trains on the same file. A
failed judgement never becomes a number, and everything left out is counted by its reason.
"""

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from huatuo_jax.data.records import Comparison, same_answer
from huatuo_jax.data.records import answer as continuation
from huatuo_jax.feedback import comparison_balance as balancing
from huatuo_jax.feedback.comparison_config import ComparisonConfig
from huatuo_jax.feedback.comparison_mixing import read_mixed
from huatuo_jax.feedback.judgements import Judgement, Protocol, current
from huatuo_jax.feedback.questions import Answered
from huatuo_jax.feedback.verdicts import (
    FAILED,
    PairKey,
    answer_scores,
    matching,
    one_judge,
    pair_verdicts,
    pairs_of,
)
from huatuo_jax.json_lines import write_rows

NOT_JUDGED = "not judged"
JUDGEMENT_FAILED = "a judgement of the pair failed"
ONE_ORDER = "judged in one order only"
SAME_TEXT = "both answers are the same text"
TIE = "tie"
DISAGREEMENT = "the two orders disagree"
MAX_PAIRS = "more pairs of the prompt than max_pairs_per_prompt"

# Of an answers record: about all answers and not about two.
_NOT_CARRIED = ("answers",)


@dataclass(frozen=True, kw_only=True)
class ComparisonReport:
    """Where everything went.

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
        """The fields as plain values."""
        return dataclasses.asdict(self)

    def text(self) -> str:
        """A few lines to read."""
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
    """All comparisons that judgements of answers give, ordered by id.

    Args:
        judgements: in any order; superseded ones may be among them.
        answered: the prompts with their answers, as the judge had them.
        cfg: the policies.

    Raises:
        ValueError: two prompts of one id; several kinds of judgements and no choice between them;
            no judgement of these texts at all; a balance that cannot be; a file to mix in that
            cannot be read.
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
        balancing.LENGTH: cfg.max_length_ratio,
        balancing.SOURCE: cfg.max_source_ratio,
        balancing.TURNS: cfg.max_turns_ratio,
    }
    kept, thinned = balancing.balance(kept, max_ratios=ratios, seed=cfg.seed)
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
    """Writes the file whole or not at all; one that stands there is replaced."""
    write_rows(path, (one.to_json() for one in comparisons))


def _of_prompt(
    answered: Answered,
    label_of: Callable[[PairKey], _Label | str],
    provenance: Mapping[str, str],
    cfg: ComparisonConfig,
) -> tuple[list[Comparison], Counter[str]]:
    """The comparisons of one prompt, and why its other pairs are none."""
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
        found = balancing.in_random_order(found, seed=cfg.seed, purpose=MAX_PAIRS)
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
            return _Label(float(margin > 0), margin)
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
    """The more likely answer is the chosen one; of a tie, the one that stands first."""
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
            f"comparison {repeated[0]!r} is there twice; does mix name a file or a source twice?"
        )


def _reasons(left_out: Iterable[tuple[Judgement, str]]) -> Counter[str]:
    return Counter(reason for _, reason in left_out)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items()) or "none"
