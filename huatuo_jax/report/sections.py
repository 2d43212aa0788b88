"""The parts of a report up to the reward model: data, curves, judge, reward model.

Three consultations side by side, each in another situation, with what is true of each answer.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from huatuo_jax.clinic.dialogues import Situation, conditions_against, situation
from huatuo_jax.clinic.findings import Findings, find, truth_of
from huatuo_jax.data.records import Prompt, is_empty
from huatuo_jax.judge.offline import is_of_clinic
from huatuo_jax.report import plots
from huatuo_jax.report.markup import (
    Run,
    figures,
    interval,
    number,
    paragraph,
    section,
    table,
    text,
    turns,
)

OFFLINE_NOTE = (
    '<p class="note"><strong>What the offline judge is.</strong> A fixed rubric '
    "(<code>offline-rubric-v1</code>) that counts measurable properties: characters shared with "
    "the doctor's answer or the diagnosis, length within reason, repetition, punctuation and "
    "paragraphs, whether the patient is asked back, a few unsafe wordings. It lets the whole "
    "recipe run and be tested for nothing. <strong>What it is not:</strong> it does not "
    "understand a sentence, does not know medicine, and is no substitute for a judge that reads. "
    "A gain before it shows that the machinery works, not that the answers are better "
    "medicine.</p>"
)

TRUTH_NOTE = (
    '<p class="note"><strong>What the clinic\'s judge is.</strong> It '
    "(<code>clinic-truth-v1</code>) reads an answer by the grammar of a small invented world and "
    "holds it against that world's table of diseases: the right disease, the tests, departments, "
    "advice and drugs that belong to it, questions where they are needed, dangers missed. "
    "<strong>What it is not:</strong> it knows no other patients and no other medicine.</p>"
)

_PLACES_SHOWN = 3

# What a stage's result says in this table, and in which words.
_GAVE = {
    "step": "steps",
    "eval/loss": "held-out loss",
    "eval/accuracy": "held-out accuracy",
    "prompts": "prompts",
    "answers": "answers",
    "tokens_per_answer": "tokens an answer",
    "stopped": "share that came to an end",
    "empty": "share that says nothing",
    "comparisons": "comparisons",
    "kept_iteration": "kept iteration",
    "ppo/score": "mean score",
    "ppo/kl_per_sequence": "KL from SFT (nats an answer)",
    "reward_gain_value": "PPO's gain in score",
}


def data(run: Run) -> str:
    """What was trained on what."""
    parts = []
    if run.dialogues is not None:
        kinds: dict[str, dict[str, Any]] = {
            split: groups["by_kind"] for split, groups in run.dialogues["splits"].items()
        }
        names = list(dict.fromkeys(name for found in kinds.values() for name in found))
        rows = [
            [
                text(name),
                *(
                    number(kinds[split][name][field] if name in kinds[split] else 0)
                    for split in kinds
                    for field in ("examples", "trained_tokens")
                ),
            ]
            for name in names
        ]
        head = [
            "kind",
            *(f"{split}: {what}" for split in kinds for what in ("dialogues", "tokens")),
        ]
        parts.append(
            table(
                [text(one.replace("_", " ")) for one in head],
                rows,
                caption="Dialogues; tokens are the trained ones",
            )
        )
    results = {
        name: entry["result"] for name, entry in run.journal.items() if entry["result"] is not None
    }
    rows = [[text(name), *_trained_on(name, results[name], run)] for name in results]
    parts.append(table(["stage", "made from", "gave"], rows, words=True))
    parts += _left_out(run)
    return section("data", "What was trained on what", *parts)


def _left_out(run: Run) -> list[str]:
    """Of each stage what was read, used and left out, and by which reasons."""
    if not run.accounts:
        return []
    rows = []
    reasons = []
    for name, account in run.accounts.items():
        left_out = account["rows_left_out"] | account["left_out"]
        used = ", ".join(
            f"{text(purpose)} {number(count)}"
            for purpose, count in (account["used"] | account["set_aside"]).items()
        )
        rows.append(
            [
                text(name),
                number(account["rows"]),
                f"{number(account['records'])} {text(account['unit'])}",
                used or "none",
                number(sum(left_out.values())),
            ]
        )
        for reason, count in left_out.items():
            places = account["places"][reason] if reason in account["places"] else []
            shown = text("; ".join(places[:_PLACES_SHOWN]))
            reasons.append([text(name), text(reason), number(count), shown])
    parts = [
        table(["stage", "rows read", "made of them", "used", "left out"], rows, words=True),
    ]
    if reasons:
        head = ["stage", "left out because", "number", "such as"]
        parts.append(table(head, reasons, words=True, caption="What was left out"))
    return parts


def curves(run: Run) -> str:
    """The curves of every training stage."""
    drawn = []
    for stage, name, caption in (
        ("sft", "loss", "Fine-tuning: cross-entropy of the doctor's tokens."),
        ("reward", "loss", "Reward model: cross-entropy of the comparisons."),
        ("reward", "accuracy", "Reward model: share of comparisons it agrees with."),
    ):
        lines = {
            label: run.series(stage, f"{prefix}/{name}")
            for label, prefix in (("training", "train"), ("held out", "eval"))
        }
        lines = {label: found for label, found in lines.items() if found[0]}
        if lines:
            svg = plots.curves(lines, name=f"{stage}-{name}", x="step", y=name)
            drawn.append((svg, caption))
    for name, label, caption in (
        ("score", "score", "PPO: mean score of the answers by the reward model."),
        ("kl_per_sequence", "KL (nats an answer)", "PPO: KL divergence from the SFT model."),
        ("response_length", "tokens", "PPO: mean length of the policy's answers."),
        ("sampled_entropy", "nats a token", "PPO: entropy of the policy."),
    ):
        found = run.series("ppo", f"ppo/{name}")
        if found[0]:
            svg = plots.curves({label: found}, name=f"ppo-{name}", x="iteration", y=label)
            drawn.append((svg, caption))
    return section("curves", "Curves of every stage", figures(*drawn)) if drawn else ""


def judge(run: Run) -> str:
    """What the judge did."""
    if run.labels is None:
        return ""
    rows = []
    for part in run.labels["judges"]:
        position = part["position"]
        rows.append(
            [
                f"{text(part['judge'])} ({text(part['protocol'])})",
                number(part["judgements"], name="judgements"),
                _figure(part["failure_rate"]),
                _figure(part["ties"]),
                _figure(part["longer_wins"], name="longer_wins"),
                "not asked in pairs" if position is None else _figure(position["flip_rate"]),
                "not asked in pairs" if position is None else _figure(position["log_odds"]),
            ]
        )
    head = [
        "judge",
        "judgements",
        "failed",
        "ties",
        "longer answer wins",
        "orders flip",
        "position bias (log-odds)",
    ]
    parts = [table(head, rows, caption="± is one standard error")]
    scores = next((p["scores"] for p in run.labels["judges"] if p["scores"]), None)
    if scores:
        parts.append(
            table(
                list(map(text, scores)),
                [[_figure(found) for found in scores.values()]],
                caption="Mean scores of the answers that were labelled, 1 to 5",
            )
        )
    names = {part["judge"] for part in run.labels["judges"]}
    if any(name.startswith("offline") for name in names):
        parts.insert(0, OFFLINE_NOTE)
    if any(name.startswith("clinic") for name in names):
        parts.insert(0, TRUTH_NOTE)
    return section("judge", "The judge", *parts)


def reward_model(run: Run) -> str:
    """How far the reward model can be trusted."""
    found = run.reward
    if found is None:
        return ""
    length = found["length_baseline"]
    rows = [
        [
            "reward model",
            interval(found["accuracy"], name="reward_accuracy"),
            number(found["loss"]),
            number(found["calibration"]["expected_calibration_error"]),
        ],
        [
            "length alone",
            interval(length["accuracy"], name="length_accuracy"),
            number(length["loss"]),
            number(length["calibration"]["expected_calibration_error"]),
        ],
    ]
    relation = found["score_length_correlation"]
    drawn = plots.reliability(found, name="reliability")
    caption = (
        f"{found['num_pairs']} held-out pairs of {found['num_cases']} prompts; the dots' size is "
        "the number of pairs."
    )
    by_margin = [
        [
            f"{one['margin_low']:.3f} to {one['margin_high']:.3f}",
            interval(one if "value" in one else None),
        ]
        for one in found["accuracy_by_margin"]
    ]
    parts = [
        table(["", "accuracy", "loss", "calibration error"], rows, caption="On held-out pairs"),
        paragraph(
            f"Above the length baseline by {interval(found['accuracy_above_length_baseline'])}.",
            f"Correlation of score and characters: {number(relation['all_answers'])} over all "
            f"answers, {number(relation['within_prompts'])} among answers to one prompt.",
        ),
        figures((drawn, caption)),
    ]
    if "probes" in found and found["probes"]:  # Older reports have none.
        parts += _probes(found["probes"])
    if by_margin:
        parts.append(table(["judge's margin", "accuracy"], by_margin))
    return section("reward", "The reward model", *parts)


def _probes(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the reward model makes of pairs that differ in one thing alone."""
    rows = [
        [
            text(one["name"]),
            f"the {text(one['chosen'])} one" + (" (neither is right)" if one["neutral"] else ""),
            interval(one["accuracy"], name=f"probe_{one['name']}"),
            interval(one["length_accuracy"]),
            number(one["accuracy"]["num_pairs"]),
        ]
        for one in found
    ]
    head = ["what differs", "scores higher", "reward model", "length alone", "pairs"]
    told = "Where neither side is right, .5 is indifference, and better than any preference."
    return [
        table(
            head, rows, caption="Pairs that differ in one thing alone; no other figure holds them"
        ),
        *([paragraph(told)] if any(one["neutral"] for one in found) else []),
    ]


def _trained_on(name: str, result: Mapping[str, Any], run: Run) -> tuple[str, str]:
    inputs = ", ".join(text(one) for one in run.journal[name]["inputs"]) or "the run's files"
    shown = [
        f"{label} {number(result[field])}"
        for field, label in _GAVE.items()
        if field in result and result[field] is not None
    ]
    return inputs, "; ".join(shown) or "done"


def _figure(found: Mapping[str, Any], *, name: str | None = None) -> str:
    error = found["standard_error"]
    shown = "" if error is None else f' <span class="ci">± {number(error)}</span>'
    return number(found["value"], name=name) + shown


SECTION = "consultations"
SHOWN = {"sft": "SFT", "ppo": "PPO", "reference": "Reference"}

_TITLES: Mapping[Situation, str] = {
    "clear": "A clear case",
    "ask": "Asking comes first",
    "danger": "Something must not be missed",
}
_CONDITIONS = {
    "青霉素过敏": "the penicillin allergy",
    "怀孕": "the pregnancy",
    "胃出血史": "the earlier stomach bleed",
    "肾功能不好": "the weak kidneys",
    "肝功能不好": "the weak liver",
}
_BROKEN = {
    "broken_characters": "has broken characters",
    "repetitive": "says the same again",
    "unfinished": "breaks off",
    "disordered": "is out of order",
}


class Remark(NamedTuple):
    """What is true of an answer, and whether that is as it should be."""

    told: str
    good: bool


def consultations(run: Run) -> str:
    """A held-out prompt of each situation; nothing where the truth is not known."""
    records = {name: {one["id"]: one for one in run.answers[name]} for name in SHOWN}
    prompts = [
        Prompt.from_json(record)
        for record in run.answers["ppo"]
        if "source" in record and record["id"] in records["sft"]
    ]
    chosen = choose(prompts)
    if not chosen:
        return ""
    shown = [_consultation(kind, chosen[kind], records) for kind in _TITLES if kind in chosen]
    told = paragraph(
        "Of each kind the first held-out prompt in which the doctor has spoken once, else the "
        "shortest, and the first answer of each model: not chosen by their looks. The lines below "
        "the answers are read from them, and held against the table of the invented world that the "
        "patients are of."
    )
    return section(SECTION, "Consultations side by side", told, *shown)


def choose(prompts: Sequence[Prompt]) -> dict[Situation, Prompt]:
    """Of each situation the clinic's first prompt with one doctor's turn, else the shortest."""

    def rank(prompt: Prompt) -> tuple[bool, int]:
        spoken = sum(turn.role == "assistant" for turn in prompt.messages)
        return spoken != 1, spoken

    chosen: dict[Situation, Prompt] = {}
    for prompt in sorted(filter(is_of_clinic, prompts), key=rank):  # Equal ones keep their order.
        chosen.setdefault(situation(prompt), prompt)
    return chosen


def remarks(prompt: Prompt, answer: str) -> list[Remark]:
    """What is true of an answer in plain words, what matters most first.

    Raises:
        ValueError: the prompt's diagnosis is none of the clinic's.
    """
    found = find(prompt, answer)
    if is_empty(answer):
        return [Remark("says nothing", False)]
    told = [*_dangers(prompt, found), *_diagnosis(prompt, found)]
    wrong = [item.name for item in found.wrong_items if item.name not in found.contraindicated]
    if wrong:
        told.append(Remark(f"orders what belongs to other diseases: {'、'.join(wrong)}", False))
    elif found.items and not found.contraindicated:
        told.append(Remark("all it orders belongs to this disease", True))
    told += [Remark(words, False) for fault, words in _BROKEN.items() if fault in found.faults]
    return told


def _dangers(prompt: Prompt, found: Findings) -> list[Remark]:
    told = []
    for order in found.contraindicated:
        reasons = [_CONDITIONS[name] for name in conditions_against(prompt, order)]
        why = f"in spite of {' and '.join(reasons)}" if reasons else "which is not for this age"
        told.append(Remark(f"orders {order} {why}", False))
    if found.red_flag_missed:
        told.append(Remark("does not send to emergency care, which is needed", False))
    elif found.emergency:
        told.append(Remark("sends to emergency care, as it should", True))
    if found.false_alarm:
        told.append(Remark("sends to emergency care without need", False))
    return told


def _diagnosis(prompt: Prompt, found: Findings) -> list[Remark]:
    truth, named = truth_of(prompt).name, "、".join(found.named)
    told = []
    if found.should_ask:
        asks = found.asks_when_needed
        told.append(
            Remark("asks what has to be known first" if asks else "should have asked first", asks)
        )
    if found.diagnosis == "right":
        told.append(Remark(f"names the right disease, {truth}", True))
    elif found.diagnosis == "plausible":
        told.append(Remark(f"names {named}, which may be; it is {truth}", found.should_ask))
    elif found.diagnosis == "wrong":
        told.append(Remark(f"names {named}; it is {truth}", False))
    elif not found.should_ask:
        told.append(Remark(f"names no disease; it is {truth}", False))
    return told


def _consultation(
    kind: Situation, prompt: Prompt, records: Mapping[str, Mapping[str, Mapping[str, Any]]]
) -> str:
    asked = turns((turn.role, turn.content) for turn in prompt.messages)
    boxes = "".join(
        _box(SHOWN[name], prompt, found[prompt.id]["answers"][0]["text"])
        for name, found in records.items()
        if prompt.id in found
    )
    title = f"<h3>{_TITLES[kind]}</h3>"
    return f'<div class="prompt">{title}{asked}<div class="answers">{boxes}</div></div>'


def _box(name: str, prompt: Prompt, answer: str) -> str:
    said = "<em>(an empty answer)</em>" if is_empty(answer) else text(answer)
    lines = "".join(
        f'<li class="{"good" if one.good else "bad"}">{text(one.told)}</li>'
        for one in remarks(prompt, answer)
    )
    return (
        f'<div class="answer"><h4>{text(name)}</h4><div>{said}</div><ul class="truth">{lines}</ul>'
        "</div>"
    )
