"""The page itself: head, contents, parts; one file that needs nothing beside it.

How the page looks: system fonts, nothing loaded from anywhere, one column on a phone.

What a report begins with: the main numbers, and in words what they say.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

from huatuo_jax.core.files import write_file
from huatuo_jax.judge.offline import TRUTHS
from huatuo_jax.report import outcome, sections
from huatuo_jax.report import sections as consultations
from huatuo_jax.report.markup import (
    Run,
    bounds,
    card,
    interval,
    number,
    paragraph,
    percent,
    read_run,
    seconds,
    text,
)
from huatuo_jax.report.outcome import costs

STYLE = """
:root { color-scheme: light; --ink: #1c2430; --soft: #5b6675; --line: #dfe4ea; --back: #f5f7f9;
  --accent: #0b6e69; --warn: #8a5a00; --warn-back: #fff6e0; --bad: #b3261e; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: var(--back); line-height: 1.5;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "PingFang SC",
  "Microsoft YaHei", "Noto Sans CJK SC", "Noto Sans SC", "WenQuanYi Zen Hei", sans-serif; }
main, header > div { max-width: 1120px; margin: 0 auto; padding: 0 20px; }
header { background: var(--accent); color: white; padding: 28px 0 22px; }
header h1 { margin: 0 0 4px; font-size: 1.7rem; line-height: 1.2; }
header p { margin: 0; opacity: .9; overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: 4px 16px; margin-top: 14px; font-size: .9rem; }
nav a { color: white; }
section { background: white; border: 1px solid var(--line); border-radius: 10px;
  margin: 18px 0; padding: 6px 20px 18px; }
h2 { font-size: 1.25rem; margin: 14px 0 8px; }
h3 { font-size: 1rem; margin: 16px 0 6px; }
p { margin: 8px 0; max-width: 75ch; }
.cards { display: grid; gap: 12px; margin: 18px 0; grid-template-columns: repeat(auto-fit,
  minmax(160px, 1fr)); }
.card { background: white; border: 1px solid var(--line); border-radius: 10px; padding: 12px 16px; }
.card h3 { margin: 0; font-size: .85rem; color: var(--soft); font-weight: 600; }
.card p { margin: 2px 0 0; font-size: .85rem; color: var(--soft); }
.card .big { font-size: 1.6rem; color: var(--ink); font-weight: 650; line-height: 1.25;
  font-variant-numeric: tabular-nums; }
.note { background: var(--warn-back); border-left: 4px solid var(--warn); border-radius: 6px;
  padding: 8px 14px; margin: 14px 0; max-width: none; }
.scroll { overflow-x: auto; margin: 10px 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: 4px; }
th, td { text-align: right; padding: 5px 10px; border-bottom: 1px solid var(--line);
  vertical-align: top; }
thead th { color: var(--soft); font-weight: 600; white-space: nowrap; }
tr > :first-child { text-align: left; padding-left: 0; }
tbody th { font-weight: 500; }
table.words td, table.words th { text-align: left; }
.ci { color: var(--soft); font-size: .85em; white-space: nowrap; }
.figures { display: grid; gap: 14px; margin: 12px 0; grid-template-columns: repeat(auto-fit,
  minmax(min(320px, 100%), 1fr)); }
figure { margin: 0; min-width: 0; }
figure svg { width: 100%; height: auto; max-width: 520px; display: block; }
figcaption { font-size: .85rem; color: var(--soft); max-width: 60ch; }
.prompt { border-top: 1px solid var(--line); padding: 10px 0 4px; }
.turn { margin: 2px 0; max-width: none; }
.turn b { color: var(--soft); font-weight: 600; margin-right: 6px; }
.answers { display: grid; gap: 10px; margin: 8px 0; grid-template-columns: repeat(auto-fit,
  minmax(min(230px, 100%), 1fr)); }
.answer { background: var(--back); border-radius: 8px; padding: 8px 12px; font-size: .92rem; }
.answer h4 { margin: 0 0 4px; font-size: .85rem; color: var(--accent); }
.answer div { white-space: pre-wrap; overflow-wrap: anywhere; }
.answer p { margin: 6px 0 0; font-size: .8rem; color: var(--soft); }
.truth { margin: 8px 0 0; padding: 0; list-style: none; font-size: .85rem; }
.truth li { padding-left: 1.3em; text-indent: -1.3em; }
.truth .good::before { content: "✓ "; color: var(--accent); font-weight: 700; }
.truth .bad::before { content: "✗ "; color: var(--bad); font-weight: 700; }
details { margin: 8px 0; } summary { cursor: pointer; color: var(--accent); }
code { font-size: .88em; overflow-wrap: anywhere; }
footer { color: var(--soft); font-size: .85rem; padding: 4px 0 32px; }
@media (max-width: 600px) { section { padding: 4px 14px 14px; } main, header > div { padding: 0
  12px; } .cards { grid-template-columns: 1fr 1fr; } .card { padding: 10px 12px; }
  .card .big { font-size: 1.3rem; }
  table.words, table.words tbody, table.words tr, table.words tbody th, table.words td {
    display: block; padding: 1px 0; border: 0; }
  table.words thead { display: none; }
  table.words tr { border-bottom: 1px solid var(--line); padding: 6px 0; } }
"""


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


_CONTENTS = {
    consultations.SECTION: "Consultations",
    "release": "Release",
    "data": "Data",
    "curves": "Curves",
    "judge": "Judge",
    "reward": "Reward model",
    "ppo": "PPO",
    "evaluation": "Evaluation",
    "answers": "Answers",
    "costs": "Time and settings",
}


def write_report(
    workdir: pathlib.Path, output: pathlib.Path, *, title: str, num_prompts: int
) -> None:
    """Writes the report of what a run's folder holds, whole or not at all.

    Args:
        workdir: the run's folder.
        output: the page.
        title: its heading.
        num_prompts: prompts whose answers are shown.

    Raises:
        ValueError: a file of the run is no JSON.
        OSError: the page cannot be written.
    """
    page = make_page(read_run(workdir), title=title, num_prompts=num_prompts)
    write_file(output, page)


def make_page(run: Run, *, title: str, num_prompts: int) -> str:
    """The report as one HTML page; parts of stages that did not run are left out."""
    parts = [
        consultations.consultations(run),
        outcome.release(run),
        sections.data(run),
        sections.curves(run),
        sections.judge(run),
        sections.reward_model(run),
        outcome.ppo(run),
        outcome.evaluation(run),
        outcome.answers(run, num_prompts=num_prompts),
        costs(run),
    ]
    links = "".join(
        f'<a href="#{name}">{label}</a>'
        for name, label in _CONTENTS.items()
        if any(f'<section id="{name}">' in part for part in parts)
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head><body>"
        f"<header><div><h1>{text(title)}</h1><p>{text(_told(run))}</p><nav>{links}</nav></div>"
        f"</header><main>{headline(run)}{''.join(parts)}"
        "<footer>Made by huatuo_jax. A model of this run is no doctor, and nothing here is medical "
        "advice.</footer></main></body></html>\n"
    )


def _told(run: Run) -> str:
    finished = [entry["finished"] for entry in run.journal.values() if entry["finished"]]
    when = f", {max(finished)[:16].replace('T', ' ')} UTC" if finished else ""
    return f"Run {run.folder.name}{when}"
