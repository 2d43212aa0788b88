"""What a report begins with: the main numbers, and in words what they say."""

from collections.abc import Mapping
from typing import Any

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


def headline(run: Run) -> str:
    """The main numbers, each found by its name."""
    cards = []
    evaluation = run.evaluation
    if evaluation is not None:
        gain = evaluation["differences"]["ppo_over_sft"]["reward"]
        wins = evaluation["win_rates"]["ppo_over_sft"]
        divergence = evaluation["kl"]["per_sequence"]
        cards += [
            card(
                "Reward, PPO over SFT",
                _signed(gain, "reward_gain"),
                f"{'' if gain is None else bounds(gain)} (95 %) on {evaluation['num_prompts']} "
                "held-out prompts; 1 is the spread of SFT's scores",
            ),
            card(
                "Judge prefers PPO to SFT",
                percent(wins["share"]["value"] if wins["share"] else None),
                f"{wins['wins']} wins, {wins['ties']} ties, {wins['losses']} losses "
                f"({text(evaluation['judge'])}, both orders)",
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
    verdict = "" if evaluation is None else _verdict(evaluation)
    return f'<div class="cards">{"".join(cards)}</div>{verdict}'


def _verdict(evaluation: Mapping[str, Any]) -> str:
    """In words what the numbers say, and no more than they say."""
    gain = evaluation["differences"]["ppo_over_sft"]["reward"]
    if gain is None:
        return ""
    if gain["low"] > 0:
        told = "PPO's answers score higher than SFT's, outside the 95 % interval"
    elif gain["high"] < 0:
        told = "PPO's answers score lower than SFT's, outside the 95 % interval"
    else:
        told = "PPO's and SFT's answers score alike within the 95 % interval"
    length = evaluation["length"]
    rest = length["gain_at_equal_length"]
    return paragraph(
        f"<strong>{told}.</strong>",
        f"Of the difference, {number(length['gain_by_length']['value'])} goes with the length of "
        f"the answers; at equal length {interval(rest, name='gain_at_equal_length')} is left.",
        "Scores are the reward model's, which learned from the judge named below.",
        _before_the_judge(evaluation["win_rates"]["ppo_over_sft"]["share"]),
    )


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
