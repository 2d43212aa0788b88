"""What a report begins with: the main numbers, and in words what they say."""

from collections.abc import Mapping
from typing import Any

from huatuo_jax.feedback.truth_judge import TRUTHS
from huatuo_jax.report.markup import (
    bounds,
    card,
    interval,
    number,
    paragraph,
    percent,
    seconds,
    text,
)
from huatuo_jax.report.run import Run

_MODELS = {
    "base": "base",
    "sft": "SFT",
    "best_of_n": "best-of-n",
    "ppo": "PPO",
    "reference": "reference answers",
}
_TRUTH = "truth_diagnosis_right"
# The evaluation's fields.
_TRUTHS = {f"truth_{name}": found for name, found in TRUTHS.items()}


def headline(run: Run) -> str:
    """The main numbers, each found by its name: truth where it is known, then the judge."""
    evaluation = run.evaluation
    cards = [] if evaluation is None else _outcome(evaluation)
    if run.reward is not None and run.reward["accuracy"] is not None:
        length = run.reward["length_baseline"]["accuracy"]
        cards.append(
            card(
                "Reward model's accuracy",
                percent(run.reward["accuracy"]["value"]),
                f"on {run.reward['num_pairs']} held-out pairs; length alone "
                f"{percent(length['value'])}",
            )
        )
    spent = sum(entry["seconds"] for entry in run.journal.values())
    cards.append(card("Time", seconds(spent), f"all stages together; judge's cost {_cost(run)}"))
    truth, verdict = ("", "") if evaluation is None else (_truth(evaluation), _verdict(evaluation))
    return f'{truth}<div class="cards">{"".join(cards)}</div>{verdict}'


def _truth(evaluation: Mapping[str, Any]) -> str:
    """How often each model names the right disease, where the evaluation knows."""
    models = evaluation["models"]
    known = {
        name: models[name][_TRUTH]
        for name in _MODELS
        if name in models and _TRUTH in models[name] and models[name][_TRUTH] is not None
    }
    if not known:
        return ""
    cards = "".join(
        card(
            f"Right disease: {_MODELS[name]}",
            _percent(found["value"], name=f"right_disease_{name}"),
            f'<span class="ci">[{_percent(found["low"])}, {_percent(found["high"])}]</span> (95 %) '
            f"on {number(found['num_prompts'])} prompts",
        )
        for name, found in known.items()
    )
    told = (
        "How often an answer names the right disease, where the patient has told enough for it: "
        "read from the answers and held against the table of the invented world. No reward model "
        "is part of it."
    )
    return f'<h2>Truth</h2><p>{told}</p><div class="cards">{cards}</div>'


def _outcome(evaluation: Mapping[str, Any]) -> list[str]:
    """The judge asked anew, the reward, the distance from SFT, the held-out loss."""
    gain = evaluation["differences"]["ppo_over_sft"]["reward"]
    wins = evaluation["win_rates"]["ppo_over_sft"]
    divergence = evaluation["kl"]["per_sequence"]
    cards = [
        card(
            "Judge prefers PPO to SFT",
            percent(wins["share"]["value"] if wins["share"] else None),
            f"{wins['wins']} wins, {wins['ties']} ties, {wins['losses']} losses "
            f"({text(evaluation['judge'])}, both orders)",
        ),
        card(
            "Reward, PPO over SFT",
            _signed(gain, "reward_gain"),
            f"{'' if gain is None else bounds(gain)} (95 %) on {evaluation['num_prompts']} "
            "held-out prompts; 1 is the spread of SFT's scores",
        ),
        card(
            "KL from SFT",
            number(divergence["value"] if divergence else None, name="kl_per_sequence"),
            f"nats an answer, {'' if divergence is None else bounds(divergence)}; "
            f"{number(evaluation['kl']['per_token'])} a token",
        ),
    ]
    losses = evaluation["held_out_loss"]
    if losses:
        shown = " → ".join(
            number(losses[name]["eval/loss"], name=f"held_out_loss_{name}", digits=2)
            for name in ("base", "sft", "ppo")
        )
        cards.append(card("Held-out loss", shown, "base → SFT → PPO, nats a token"))
    return cards


def _verdict(evaluation: Mapping[str, Any]) -> str:
    """In words what the numbers say, and no more than they say."""
    gain = evaluation["differences"]["ppo_over_sft"]["reward"]
    told_of_truth = _verdict_of_truth(evaluation)
    if gain is None:
        return paragraph(told_of_truth) if told_of_truth else ""
    if gain["low"] > 0:
        told = "PPO's answers score higher than SFT's, outside the 95 % interval"
    elif gain["high"] < 0:
        told = "PPO's answers score lower than SFT's, outside the 95 % interval"
    else:
        told = "PPO's and SFT's answers score alike within the 95 % interval"
    length = evaluation["length"]
    rest = length["gain_at_equal_length"]
    return (paragraph(told_of_truth) if told_of_truth else "") + paragraph(
        f"<strong>{told}.</strong>",
        f"Of the difference, {number(length['gain_by_length']['value'])} goes with the length of "
        f"the answers; at equal length {interval(rest, name='gain_at_equal_length')} is left.",
        "Scores are the reward model's, which learned from the judge named below.",
        _before_the_judge(evaluation["win_rates"]["ppo_over_sft"]["share"]),
    )


def _verdict_of_truth(evaluation: Mapping[str, Any]) -> str:
    """Whether PPO's answers are truer than SFT's, beside what their reward says."""
    fields = evaluation["differences"]["ppo_over_sft"]
    known = {name: fields[name] for name in _TRUTHS if name in fields and fields[name] is not None}
    if not known:
        return ""
    better: list[str] = []
    worse: list[str] = []
    for name, found in known.items():
        words, more_is_better = _TRUTHS[name]
        if found["low"] > 0 or found["high"] < 0:
            rises = found["low"] > 0
            change = f"{words} {'more' if rises else 'less'} often ({interval(found)})"
            (better if rises == more_is_better else worse).append(change)
    gain = fields["reward"]
    rose = gain is not None and gain["low"] > 0
    if worse:
        fell = "Reward rose and truth fell" if rose else "Truth fell"
        parts = [f"<strong>{fell}:</strong> PPO {', '.join(worse)} than SFT."]
        if better:
            parts.append(f"It {', '.join(better)}.")
        return " ".join(parts)
    if better:
        rises = "Reward and truth rose" if rose else "Truth rose"
        return f"<strong>{rises}:</strong> PPO {', '.join(better)} than SFT."
    shown = f" ({interval(known[_TRUTH])})" if _TRUTH in known else ""
    told = f"PPO's answers are neither truer nor less true than SFT's within the interval{shown}."
    return f"<strong>Reward rose and truth did not:</strong> {told}" if rose else told


def _percent(value: float, *, name: str | None = None) -> str:
    return f"{number(100 * value, name=name, digits=1)} %"


def _before_the_judge(share: Mapping[str, Any] | None) -> str:
    """Whether the judge, asked anew, agrees with the reward model."""
    if share is None:
        return ""
    told = f"Asked anew, the judge gives PPO {interval(share, name='judge_share')} of the points"
    if share["low"] > 0.5:
        return f"{told}: it prefers PPO's answers, too."
    if share["high"] < 0.5:
        return f"{told}: it prefers SFT's answers. The reward model was misled."
    return f"{told}: no preference beyond chance, so the gain may be the reward model's alone."


def _signed(found: Mapping[str, Any] | None, name: str) -> str:
    if found is None:
        return number(None)
    return ("+" if found["value"] > 0 else "") + number(found["value"], name=name)


def _cost(run: Run) -> str:
    if run.labels is None:
        return number(None)
    cost = number(sum(part["cost"]["money"] for part in run.labels["judges"]), digits=2)
    prices = run.labels["prices"] if "prices" in run.labels else None
    return cost if prices is None else f"{cost} {text(prices['currency'])}"
