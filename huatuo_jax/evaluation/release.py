"""Chooses the model of a run to release, base, SFT, best-of-n or PPO, by the judge's verdicts.

The rule uses the judge's shares of the points on held-out prompts, each with its 95 % interval
over prompts:

1. SFT is chosen, unless the judge prefers base to it: the interval of SFT's share over base lies
   below 1/2. Then base is chosen.
2. PPO and best-of-n may replace it only if the judge prefers them to SFT, and to base where base is
   chosen: the interval of their share lies above 1/2.
3. Where both may, PPO is chosen, unless best-of-n has no lower share over SFT and the judge prefers
   it to PPO too: best-of-n costs n times the inference.

So neither is released by default, and where nothing is certain SFT is. A comparison on fewer than
`LEAST_PROMPTS` prompts decides nothing.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

from huatuo_jax.evaluation.answers import BEST_OF_N, kl_upper_bound
from huatuo_jax.judge.offline import TRUTHS

Candidate = Literal["base", "sft", "best_of_n", "ppo"]
CANDIDATES: tuple[Candidate, ...] = get_args(Candidate)

COMPARED = (
    ("sft", "base"),
    ("ppo", "sft"),
    ("ppo", "base"),
    (BEST_OF_N, "sft"),
    (BEST_OF_N, "base"),
    (BEST_OF_N, "ppo"),
)
"""The comparisons that the rule uses, the later model first."""

LEAST_PROMPTS = 20
"""A bootstrap's interval over fewer prompts is too narrow: of judges without a preference up to one
in twelve would seem to have one with 4 prompts, one in thirty with 20 (nominally one in forty)."""


class Decision(NamedTuple):
    """The outcome of the rule.

    Attributes:
        pick: the model to release.
        reason: one sentence that names it.
    """

    pick: Candidate
    reason: str


def release(figures: Mapping[str, Any], *, best_of_n: int) -> dict[str, Any]:
    """Applies the rule and returns all figures that it used, for `evaluation.json`.

    Args:
        figures: from `stage.compare`: `num_prompts`, `judge`, `models`, `differences`, `win_rates`.
        best_of_n: the n.

    Returns:
        `pick` and `reason`; `comparisons` with share, interval, pairs without a verdict, and the
        `preferred` model (its name, `neither`, or `too few prompts`); `best_of_n`; where the judge
        knows the truth, `truth` of pick and SFT with the interval of the difference; `warnings`.
    """
    pick, reason = decide(
        figures["win_rates"],
        judge=figures["judge"],
        num_prompts=figures["num_prompts"],
        best_of_n=best_of_n,
    )
    truth = _truth(figures, pick)
    shares = _Shares(figures["win_rates"])
    return {
        "pick": pick,
        "reason": reason,
        "num_prompts": figures["num_prompts"],
        "judge": figures["judge"],
        "comparisons": {
            _pair(one, other): {
                "share": figures["win_rates"][_pair(one, other)]["share"],
                "failed": figures["win_rates"][_pair(one, other)]["failed"],
                "preferred": shares.preferred(one, other),
            }
            for one, other in COMPARED
        },
        "best_of_n": {"n": best_of_n, "kl_upper_bound": kl_upper_bound(best_of_n)},
        "truth": truth,
        "warnings": _warnings(truth, names(best_of_n)[pick]),
    }


def decide(
    win_rates: Mapping[str, Mapping[str, Any]], *, judge: str, num_prompts: int, best_of_n: int
) -> Decision:
    """Applies the rule.

    Args:
        win_rates: for each of `COMPARED`, as `{one}_over_{other}`: `share` with its interval or
            None, and `failed`.
        judge: its name, for the reason.
        num_prompts: held-out prompts, for the reason.
        best_of_n: the n, for the reason.
    """
    shares = _Shares(win_rates)
    start: Candidate = "base" if shares.loses("sft", "base") else "sft"
    later: tuple[Candidate, ...] = ("ppo", "best_of_n")
    challengers = [
        one
        for one in later
        if shares.wins(one, "sft") and (start == "sft" or shares.wins(one, start))
    ]
    pick = challengers[0] if challengers else start
    is_best = shares.value(BEST_OF_N, "sft") >= shares.value("ppo", "sft")
    if len(challengers) > 1 and is_best and shares.wins(BEST_OF_N, "ppo"):
        pick = "best_of_n"
    reason = _reason(pick, start, challengers, shares, best_of_n=best_of_n)
    failed = sum(found["failed"] for found in win_rates.values())
    note = f" ({failed} pairs had no verdict)" if failed else ""
    name = names(best_of_n)[pick]
    return Decision(
        pick,
        f"{name[0].upper()}{name[1:]} is released: asked about {num_prompts} held-out prompts, "
        f"{judge} {reason}{note}.",
    )


def names(best_of_n: int) -> dict[Candidate, str]:
    """Returns the names of the candidates in a sentence."""
    return {"base": "base", "sft": "SFT", "best_of_n": f"best-of-{best_of_n}", "ppo": "PPO"}


class _Shares:
    """The judge's shares, as far as there are enough prompts."""

    def __init__(self, win_rates: Mapping[str, Mapping[str, Any]]) -> None:
        pairs = [_pair(one, other) for one, other in COMPARED]
        self._found = {pair: win_rates[pair]["share"] for pair in pairs}

    def known(self, one: str, other: str) -> Mapping[str, Any] | None:
        share: Mapping[str, Any] | None = self._found[_pair(one, other)]
        return None if share is None or share["num_prompts"] < LEAST_PROMPTS else share

    def wins(self, one: str, other: str) -> bool:
        share = self.known(one, other)
        return share is not None and bool(share["low"] > 0.5)

    def loses(self, one: str, other: str) -> bool:
        share = self.known(one, other)
        return share is not None and bool(share["high"] < 0.5)

    def preferred(self, one: str, other: str) -> str:
        if self.known(one, other) is None:
            return "too few prompts"
        if self.wins(one, other):
            return one
        return other if self.loses(one, other) else "neither"

    def value(self, one: str, other: str) -> float:
        share = self.known(one, other)
        return 0.0 if share is None else float(share["value"])

    def in_words(self, one: str, other: str) -> str:
        share = self.known(one, other)
        if share is None:
            found = self._found[_pair(one, other)]
            judged = 0 if found is None else found["num_prompts"]
            return f"only {judged} prompts were judged, {LEAST_PROMPTS} are needed"
        value, low, high = (f"{share[name]:.3f}" for name in ("value", "low", "high"))
        return f"share {value}, 95 % interval {low} to {high}"


def _reason(
    pick: Candidate,
    start: Candidate,
    challengers: list[Candidate],
    shares: _Shares,
    *,
    best_of_n: int,
) -> str:
    """Returns the end of the sentence that begins with the judge's name."""
    name = names(best_of_n)
    if all(shares.known(one, other) is None for one, other in COMPARED):
        return f"gives no interval to decide by ({shares.in_words('sft', 'base')})"
    if pick == start:
        neither = " nor ".join(
            f"{name[one]} ({shares.in_words(one, 'sft')})" for one in ("ppo", "best_of_n")
        )
        kept = f"prefers neither {neither} to SFT outside the interval"
        if start == "sft":
            return kept
        return (
            f"prefers it to SFT (SFT's {shares.in_words('sft', 'base')}), and no other model to "
            f"both: over SFT it is PPO's {shares.in_words('ppo', 'sft')}, and "
            f"{name['best_of_n']}'s {shares.in_words(BEST_OF_N, 'sft')}"
        )
    preferred = f"prefers it to SFT ({shares.in_words(pick, 'sft')})"
    if start == "base":
        preferred += f" and to base ({shares.in_words(pick, 'base')}), which it prefers to SFT"
    if len(challengers) == 1:
        return preferred
    direct = shares.in_words(BEST_OF_N, "ppo")
    if pick == "best_of_n":
        return f"{preferred}, and to PPO ({direct}), at {best_of_n} times the inference"
    return (
        f"{preferred}; {name['best_of_n']}, which costs {best_of_n} times the inference, has "
        f"{shares.in_words(BEST_OF_N, 'sft')} over SFT and {direct} over PPO, which is not enough"
    )


def _truth(figures: Mapping[str, Any], pick: Candidate) -> dict[str, Any] | None:
    """Returns each truth of the pick and of SFT, and the difference."""
    models = figures["models"]
    if f"truth_{next(iter(TRUTHS))}" not in models["sft"]:
        return None
    found = {}
    for name in TRUTHS:
        field = f"truth_{name}"
        found[name] = {
            "words": TRUTHS[name][0],
            "pick": models[pick][field],
            "sft": models["sft"][field],
            "difference": _over_sft(figures["differences"], pick, field),
        }
    return found


def _over_sft(
    differences: Mapping[str, Any], pick: Candidate, field: str
) -> Mapping[str, Any] | None:
    if pick == "sft":
        return None
    if pick != "base":
        found: Mapping[str, Any] | None = differences[_pair(pick, "sft")][field]
        return found
    turned = differences[_pair("sft", "base")][field]
    if turned is None:
        return None
    return {
        "value": -turned["value"],
        "low": -turned["high"],
        "high": -turned["low"],
        "num_prompts": turned["num_prompts"],
    }


def _warnings(truth: Mapping[str, Any] | None, name: str) -> list[str]:
    """Returns a sentence for each truth that got worse outside the interval."""
    warnings = []
    for field, found in (truth or {}).items():
        words, more_is_better = TRUTHS[field]
        gain = found["difference"]
        if gain is None or not (gain["high"] < 0 if more_is_better else gain["low"] > 0):
            continue
        warnings.append(
            f"Though the judge prefers {name} to SFT, {name} {words} "
            f"{'less' if more_is_better else 'more'} often: {gain['value']:+.3f}, 95 % interval "
            f"{gain['low']:+.3f} to {gain['high']:+.3f}."
        )
    return warnings


def _pair(one: str, other: str) -> str:
    return f"{one}_over_{other}"
