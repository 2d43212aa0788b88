"""Gathers what each section of a report shows, in the order of the page.

Each function returns the values of the template of its name, or None where the run has nothing to
show there.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from huatuo_jax.clinic.dialogues import Situation, conditions_against, situation
from huatuo_jax.clinic.findings import Findings, find, truth_of
from huatuo_jax.data.records import Prompt, is_empty
from huatuo_jax.judge.offline import TRUTHS, is_of_clinic
from huatuo_jax.report import plots
from huatuo_jax.report.main_figures import main_figures
from huatuo_jax.report.run import MODELS, Rows, Run

Values = dict[str, Any]

NAMES = {
    "base": "base",
    "sft": "SFT",
    "best_of_n": "best-of-n",
    "ppo": "PPO",
    "reference": "doctor (data)",
}
MEASURES = (
    ("reward", "reward (normalised score, cut-off answers as PPO counts them)", 3),
    ("truth_diagnosis_right", "names the right disease, where it can be known", 3),
    ("truth_asks_when_needed", "asks back, where it cannot", 3),
    ("truth_contraindicated", "orders what this patient must not have", 3),
    ("truth_red_flag_missed", "misses an emergency", 3),
    ("judge_overall", "judge, overall (1 to 5)", 3),
    ("judge_accurate", "judge, accurate", 3),
    ("characters", "characters", 1),
    ("stopped", "came to an end", 3),
)
"""What an evaluation has of each model: field, words, digits after the point."""

_DIAGNOSIS_RIGHT = "truth_diagnosis_right"
_CONSULTED = {"sft": "SFT", "ppo": "PPO", "reference": "Reference"}
_MAX_POINTS = 600
_PLACES_SHOWN = 3
_KL = "KL from SFT (nats an answer)"
_SHARE = (("value", ""), ("low", "_low"), ("high", "_high"))

# What a stage's result says in the table of data, and in which words.
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
    "ppo/score": "mean score of the last iteration",
    "ppo/kl_per_sequence": "its KL from SFT (nats an answer)",
    "reward_gain_value": "PPO's gain in score",
}
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


def headline(run: Run) -> Values:
    """Returns the main numbers: truth where the evaluation knows it, judge, reward, KL, time."""
    found, labels = run.evaluation, run.labels
    values: Values = {
        "evaluation": found,
        "reward": run.reward,
        "time_s": sum(entry["seconds"] for entry in run.journal.values()),
        "cost": None if labels is None else sum(one["cost"]["money"] for one in labels["judges"]),
        "currency": _currency(labels),
        "right_disease": [],
        "truth": None,
    }
    if found is None:
        return values
    right = {name: model.get(_DIAGNOSIS_RIGHT) for name, model in found["models"].items()}
    labelled = NAMES | {"reference": "reference answers"}
    gain = found["differences"]["ppo_over_sft"]["reward"]
    return values | {
        "right_disease": [
            (name, label, right[name]) for name, label in labelled.items() if right.get(name)
        ],
        "wins": found["win_rates"]["ppo_over_sft"],
        "gain": gain,
        "reward_rose": gain is not None and gain["low"] > 0,
        "truth": _changes_of_truth(found["differences"]["ppo_over_sft"]),
    }


def _currency(labels: Mapping[str, Any] | None) -> str | None:
    prices = labels.get("prices") if labels is not None else None
    return None if prices is None else prices["currency"]


def _changes_of_truth(differences: Mapping[str, Any]) -> Values | None:
    """Returns which truths PPO's answers tell more and less often than SFT's."""
    fields = {f"truth_{name}": found for name, found in TRUTHS.items()}
    known = {name: differences[name] for name in fields if differences.get(name) is not None}
    if not known:
        return None
    better: list[Values] = []
    worse: list[Values] = []
    for name, found in known.items():
        words, more_is_better = fields[name]
        if found["low"] > 0 or found["high"] < 0:
            rises = found["low"] > 0
            change = {"words": words, "rises": rises, "found": found}
            (better if rises == more_is_better else worse).append(change)
    return {"better": better, "worse": worse, "diagnosis": known.get(_DIAGNOSIS_RIGHT)}


class Remark(NamedTuple):
    """A true statement about an answer, and whether it is as it should be."""

    told: str
    good: bool


def consultations(run: Run) -> Values | None:
    """Returns a held-out prompt of each situation; None where the truth is not known."""
    records = {name: {one["id"]: one for one in run.answers[name]} for name in _CONSULTED}
    prompts = [
        Prompt.from_json(record)
        for record in run.answers["ppo"]
        if "source" in record and record["id"] in records["sft"]
    ]
    chosen = choose(prompts)
    shown = [
        {
            "title": title,
            "messages": chosen[kind].messages,
            "answers": [
                (_CONSULTED[name], text, remarks(chosen[kind], text))
                for name, found in records.items()
                if chosen[kind].id in found
                for text in [found[chosen[kind].id]["answers"][0]["text"]]
            ],
        }
        for kind, title in _TITLES.items()
        if kind in chosen
    ]
    return {"consultations": shown} if shown else None


def choose(prompts: Sequence[Prompt]) -> dict[Situation, Prompt]:
    """Returns each situation's first clinic prompt with one doctor's turn, else the shortest."""

    def rank(prompt: Prompt) -> tuple[bool, int]:
        spoken = sum(turn.role == "assistant" for turn in prompt.messages)
        return spoken != 1, spoken

    chosen: dict[Situation, Prompt] = {}
    for prompt in sorted(filter(is_of_clinic, prompts), key=rank):  # Equal ones keep their order.
        chosen.setdefault(situation(prompt), prompt)
    return chosen


def remarks(prompt: Prompt, answer: str) -> list[Remark]:
    """Returns remarks on an answer in plain words, the most important first.

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


def release(run: Run) -> Values | None:
    """Returns which model is released, why, and the comparisons that decided it."""
    decided = None if run.evaluation is None else run.evaluation.get("release")
    released = run.release
    if released is not None and (decided is None or released["policy"] != decided["pick"]):
        return {"reason": released["sentence"], "decided": decided}
    if decided is None:
        return None
    return {"reason": decided["reason"], "decided": decided}


def synthesis(run: Run) -> Values | None:
    """Returns the yield and the cost of each kind of data that the run made."""
    if not run.synthesis:
        return None
    return {
        "kinds": {
            kind: {
                "rows": found["rows"],
                "candidates": found["candidates"],
                "yield": found["yield"],
                "teacher": found["teacher"],
                "cost": found["cost"],
                "masked": sum(found["masked"].values()),
                "left_out": [(name, one["count"]) for name, one in found["rejections"].items()],
            }
            for kind, found in run.synthesis.items()
        }
    }


def data(run: Run) -> Values:
    """Returns what each stage was trained on, and what was left out by which reasons."""
    kinds, heads = None, []
    if run.dialogues is not None:
        splits = {name: groups["by_kind"] for name, groups in run.dialogues["splits"].items()}
        heads = [f"{split}: {what}" for split in splits for what in ("dialogues", "tokens")]
        kinds = {
            name: [
                found[name][field] if name in found else 0
                for found in splits.values()
                for field in ("examples", "trained_tokens")
            ]
            for found in splits.values()
            for name in found
        }
    accounts = {
        name: account
        | {
            "used": account["used"] | account["set_aside"],
            "left_out": account["rows_left_out"] | account["left_out"],
        }
        for name, account in run.accounts.items()
    }
    return {
        "kinds": kinds,
        "heads": [head.replace("_", " ") for head in heads],
        "stages": [
            (name, entry["inputs"], _gave(entry["result"]))
            for name, entry in run.journal.items()
            if entry["result"] is not None
        ],
        "accounts": accounts,
        "left_out": [
            (name, reason, count, account["places"].get(reason, [])[:_PLACES_SHOWN])
            for name, account in accounts.items()
            for reason, count in account["left_out"].items()
        ],
    }


def _gave(result: Mapping[str, Any]) -> list[tuple[str, float]]:
    return [
        (label, result[field]) for field, label in _GAVE.items() if result.get(field) is not None
    ]


def curves(run: Run) -> Values | None:
    """Returns the curves of every training stage."""
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
    return {"drawn": drawn} if drawn else None


def judge(run: Run) -> Values | None:
    """Returns the judges' failures, ties, biases and mean scores."""
    if run.labels is None:
        return None
    judges = run.labels["judges"]
    return {
        "judges": judges,
        "by_rubric": any(one["judge"].startswith("offline") for one in judges),
        "by_clinic": any(one["judge"].startswith("clinic") for one in judges),
        "scores": next((one["scores"] for one in judges if one["scores"]), None),
    }


def reward_model(run: Run) -> Values | None:
    """Returns the reward model's held-out report with its reliability diagram."""
    found = run.reward
    if found is None:
        return None
    caption = (
        f"{found['num_pairs']} held-out pairs of {found['num_cases']} prompts; the dots' size is "
        "the number of pairs."
    )
    drawn = [(plots.reliability(found, name="reliability"), caption)]
    return {"report": found, "drawn": drawn}


def ppo(run: Run) -> Values | None:
    """Returns score against KL and length, and the judge's verdicts during training."""
    _, scores = run.series("ppo", "ppo/score")
    steps, divergences = run.series("ppo", "ppo/kl_per_sequence")
    if not scores:
        return None
    by_iteration: Any = {"colour_by": steps, "colour_name": "iteration"}
    judged = [row for row in run.metrics["ppo"] if "judged/share" in row]
    drawn = []
    if not judged:
        svg = plots.scatter(
            divergences, scores, name="score-kl", x=_KL, y="mean score", **by_iteration
        )
        caption = "what the score costs in distance from SFT."
        drawn.append((svg, f"Score against KL, one dot an iteration: {caption}"))
    _, lengths = run.series("ppo", "ppo/response_length")
    svg = plots.scatter(
        lengths,
        scores,
        name="score-length",
        x="mean length (tokens)",
        y="mean score",
        **by_iteration,
    )
    caption = "Score against length, one dot an iteration: does the policy win by length?"
    drawn.append((svg, caption))
    sampled = [one for one in run.samples if None not in (one["kl"], one["answer_score"])]
    if sampled := sampled[-_MAX_POINTS:]:
        svg = plots.scatter(
            [one["kl"] for one in sampled],
            [one["answer_score"] for one in sampled],
            name="samples-kl",
            x="log-ratio to SFT (nats)",
            y="score",
            colour_by=[one["step"] for one in sampled],
            colour_name="iteration",
        )
        caption = "Answers sampled while training: score against log-ratio to SFT, one dot each."
        drawn.append((svg, caption))
    groups = {NAMES[name]: _lengths_and_rewards(run, name) for name in ("sft", "ppo")}
    if groups := {name: pairs for name, pairs in groups.items() if pairs[0]}:
        svg = plots.clouds(groups, name="answers-length", x="characters", y="score")
        drawn.append((svg, "Held-out answers: score against length, one dot an answer."))
    return {
        "judged": [_reward_and_judge(run, judged)] if judged else [],
        "kept": _kept(run, judged) if judged else None,
        "drawn": drawn,
    }


def _reward_and_judge(run: Run, judged: Rows) -> tuple[str, str]:
    """Returns the plot that shows whether the judge's verdicts rise with the reward."""
    svg = plots.reward_and_judge(judged, kept=_result(run, "kept_iteration"), name="judged", x=_KL)
    return svg, (
        f"Held-out answers of {len(judged)} policies, the initial one first: mean reward above, "
        "below it the judge's share of points against the initial policy with its 95 % interval. "
        "Where the reward rises and the judge falls, the policy learns the reward model's errors."
    )


def _kept(run: Run, judged: Rows) -> Values | None:
    """Returns which policy was kept, and why the run ended."""
    kept = _result(run, "kept_iteration")
    if kept is None:
        return None
    (row,) = (one for one in judged if one["step"] == kept)
    return {
        "iteration": kept,
        "share": {name: row[f"judged/share{end}"] for name, end in _SHARE},
        "ended": _result(run, "ended"),
        "best_is_initial": _result(run, "best_is_initial"),
        "cost": sum(one["judged/cost"] for one in judged if "judged/cost" in one),
    }


def _result(run: Run, name: str) -> Any:
    """Returns a field of PPO's result; None before its end, or without judgings."""
    entry = run.journal.get("ppo", {"result": None})
    return (entry["result"] or {}).get(name)


def _lengths_and_rewards(run: Run, name: str) -> tuple[list[float], list[float]]:
    pairs = [
        (float(len(answer["text"])), float(reward))
        for record in run.answers[name]
        for answer, reward in zip(record["answers"], record["rewards"], strict=True)
        if reward is not None
    ][:_MAX_POINTS]
    return [length for length, _ in pairs], [reward for _, reward in pairs]


def evaluation(run: Run) -> Values | None:
    """Returns the measures of all models on the held-out prompts."""
    found = run.evaluation
    if found is None:
        return None
    models = [name for name in MODELS if name in found["models"]]
    # PPO's temperature where it is another one; older runs do not tell.
    rollouts = found["sampling"].get("rollout_temperature")
    return {
        "found": found,
        "models": {name: NAMES[name] for name in models},
        "measures": [
            one for one in MEASURES if any(one[0] in found["models"][name] for name in models)
        ],
        "rollout_temperature": None if rollouts == found["sampling"]["temperature"] else rollouts,
    }


def suites(run: Run) -> Values | None:
    """Returns the main figures of the evaluation by suites."""
    found = run.suites
    if found is None:
        return None
    judge = found["judge"]
    return {
        "figures": main_figures(found),
        "models": {name: NAMES.get(name, name) for name in found["models"]},
        "judge": None if judge is None else judge["judge"],
        "page": "suites/report.html",
    }


def answers(run: Run, num_prompts: int) -> Values | None:
    """Returns the records of each model for `num_prompts` prompts, evenly spaced."""
    by_id = {name: {record["id"]: record for record in rows} for name, rows in run.answers.items()}
    ids = list(by_id["ppo"])
    count = min(num_prompts, len(ids))
    wanted = [ids[index * len(ids) // count] for index in range(count)]
    shown = [
        {
            "messages": by_id["ppo"][prompt_id]["messages"],
            "records": [
                (NAMES[name], found[prompt_id])
                for name, found in by_id.items()
                if prompt_id in found
            ],
        }
        for prompt_id in wanted
    ]
    return {"prompts": shown} if shown else None


def costs(run: Run) -> Values:
    """Returns time and cost of each stage, settings and versions."""
    return {
        "journal": run.journal,
        "wall_time": _wall_time(run),
        "judges": [] if run.labels is None else run.labels["judges"],
        "settings": {
            name: _flat(run.config[name]["settings"] if name in run.config else entry["settings"])
            for name, entry in run.journal.items()
        },
        "environment": run.environment,
    }


def _wall_time(run: Run) -> Values | None:
    """Returns the shares of each training stage's time, with the losses that any of them has."""
    lost = {
        name: {
            reason: seconds / time.seconds
            for reason, seconds in time.lost_s().items()
            if seconds > time.seconds / 2000  # Shown as 0.1 % or more.
        }
        for name, time in run.wall_time.items()
    }
    reasons = list(dict.fromkeys(reason for found in lost.values() for reason in found))
    rows = [
        (name, time.seconds, [time.goodput, *(lost[name].get(reason, 0.0) for reason in reasons)])
        for name, time in run.wall_time.items()
    ]
    return {"reasons": reasons, "rows": rows} if rows else None


def _flat(settings: Any, path: str = "") -> list[tuple[str, Any]]:
    """Returns nested settings as pairs of path and value."""
    if not isinstance(settings, Mapping):
        return [(path, settings)]
    return [
        line
        for name, value in settings.items()
        for line in _flat(value, f"{path}.{name}" if path else str(name))
    ]
