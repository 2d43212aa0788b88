"""The parts of a report on what came out: release, PPO's trade-offs, evaluation, answers.

The last part of a report: time and cost of each stage, settings and versions.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from huatuo_jax.data.records import is_empty
from huatuo_jax.report import plots
from huatuo_jax.report.markup import (
    ABSENT,
    MODELS,
    Rows,
    Run,
    details,
    figures,
    interval,
    number,
    paragraph,
    percent,
    seconds,
    section,
    table,
    text,
    turns,
)

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

_MAX_POINTS = 600
_KL = "KL from SFT (nats an answer)"
_SHARE = (("value", ""), ("low", "_low"), ("high", "_high"))


def release(run: Run) -> str:
    """Which model is released, why, and the comparisons that decided it."""
    decided = None
    if run.evaluation is not None and "release" in run.evaluation:
        decided = run.evaluation["release"]
    if decided is None and run.release is None:
        return ""
    told = []
    if run.release is not None and (decided is None or run.release["policy"] != decided["pick"]):
        told.append(f"<strong>{text(run.release['sentence'])}</strong>")
    elif decided is not None:
        told.append(f"<strong>{text(decided['reason'])}</strong>")
    if decided is None:
        return section("release", "What is released", paragraph(*told))
    told += [text(warning) for warning in decided["warnings"]]
    rows = [
        [
            _versus(pair),
            interval(found["share"], name=f"release_{pair}"),
            NAMES[found["preferred"]] if found["preferred"] in NAMES else text(found["preferred"]),
            number(found["share"]["num_prompts"] if found["share"] else 0),
            number(found["failed"]),
        ]
        for pair, found in decided["comparisons"].items()
    ]
    best = decided["best_of_n"]
    parts = [
        paragraph(*told),
        table(
            ["", "share of points", "the judge prefers", "prompts", "pairs without a verdict"],
            rows,
            caption=f"Judged by {text(decided['judge'])}, in both orders",
        ),
        paragraph(
            "SFT is released unless the judge prefers another model with the 95 % interval of the "
            "share above one half; best-of-n has to be preferred to PPO, too, where PPO may be "
            f"released. Best-of-n takes the answer of {number(best['n'])} that the reward model "
            f"scores highest, is compared with other SFT answers than those, and is at most "
            f"{number(best['kl_upper_bound'])} nats of KL from SFT."
        ),
    ]
    if decided["truth"] is not None:
        parts.insert(2, _truth(decided))
    return section("release", "What is released", *parts)


def _truth(decided: Mapping[str, Any]) -> str:
    """What is true of the pick's answers beside SFT's."""
    pick = NAMES[decided["pick"]]
    rows = [
        [
            text(found["words"]),
            interval(found["pick"]),
            interval(found["sft"]),
            interval(found["difference"]),
        ]
        for found in decided["truth"].values()
    ]
    head = ["", pick, "SFT", "difference"]
    return table(head, rows, caption="What is true of the answers")


def ppo(run: Run) -> str:
    """The score against what it cost: KL, and length; and what the judge says meanwhile."""
    _, scores = run.series("ppo", "ppo/score")
    steps, divergences = run.series("ppo", "ppo/kl_per_sequence")
    if not scores:
        return ""
    judged = [row for row in run.metrics["ppo"] if "judged/share" in row]
    title, lead, drawn = "PPO: score against KL and against length", [], []
    if judged:
        title = "PPO: reward and judge against KL, and length"
        lead = [_kept(run, judged), figures(_reward_and_judge(run, judged))]
    else:
        drawn.append(_score_against_kl(divergences, scores, steps))
    _, lengths = run.series("ppo", "ppo/response_length")
    drawn.append(
        (
            plots.scatter(
                lengths,
                scores,
                name="score-length",
                x="mean length (tokens)",
                y="mean score",
                colour_by=steps,
                colour_name="iteration",
            ),
            "Score against length, one dot an iteration: does the policy win by length?",
        )
    )
    sampled = [one for one in run.samples if None not in (one["kl"], one["answer_score"])]
    if sampled:
        sampled = sampled[-_MAX_POINTS:]
        drawn.append(
            (
                plots.scatter(
                    [one["kl"] for one in sampled],
                    [one["answer_score"] for one in sampled],
                    name="samples-kl",
                    x="log-ratio to SFT (nats)",
                    y="score",
                    colour_by=[one["step"] for one in sampled],
                    colour_name="iteration",
                ),
                "Answers sampled while training: score against log-ratio to SFT, one dot each.",
            )
        )
    groups = {}
    for name in ("sft", "ppo"):
        pairs = _lengths_and_rewards(run, name)
        if pairs[0]:
            groups[NAMES[name]] = pairs
    if groups:
        svg = plots.clouds(groups, name="answers-length", x="characters", y="score")
        drawn.append((svg, "Held-out answers: score against length, one dot an answer."))
    return section("ppo", title, *lead, figures(*drawn))


def _score_against_kl(
    divergences: Sequence[float], scores: Sequence[float], steps: Sequence[float]
) -> tuple[str, str]:
    svg = plots.scatter(
        divergences,
        scores,
        name="score-kl",
        x=_KL,
        y="mean score",
        colour_by=steps,
        colour_name="iteration",
    )
    return svg, "Score against KL, one dot an iteration: what the score costs in distance from SFT."


def _reward_and_judge(run: Run, judged: Rows) -> tuple[str, str]:
    """The plot that shows whether the judge still follows where the reward goes."""
    svg = plots.reward_and_judge(judged, kept=_result(run, "kept_iteration"), name="judged", x=_KL)
    return svg, (
        f"Held-out answers of {len(judged)} policies, the initial one first: mean reward above, "
        "below it the judge's share of points against the initial policy with its 95 % interval. "
        "Where the reward rises and the judge falls, the policy learns the reward model's errors."
    )


def _kept(run: Run, judged: Rows) -> str:
    """Which policy was kept, and why the run ended."""
    kept, ended = _result(run, "kept_iteration"), _result(run, "ended")
    if kept is None:
        return ""
    (row,) = (one for one in judged if one["step"] == kept)
    share = {name: row[f"judged/share{end}"] for name, end in _SHARE}
    sentences = [
        f"The policy of iteration {number(kept, name='kept_iteration')} was kept: its answers to "
        f"held-out prompts have {interval(share, name='kept_share')} of the points against the "
        "initial policy.",
        "The run ended after all iterations."
        if ended == "all iterations"
        else f"The run ended early: {text(ended)}.",
    ]
    if _result(run, "best_is_initial"):
        sentences.append(
            "<strong>No iteration has more than half of the points: the judge does not prefer any "
            "of them to the initial policy.</strong>"
        )
    if cost := sum(one["judged/cost"] for one in judged if "judged/cost" in one):
        sentences.append(f"These verdicts cost {number(cost, digits=4)}.")
    return paragraph(*sentences)


def _result(run: Run, name: str) -> Any:
    """A field of what PPO reported at its end; None before it, or without judgings."""
    entry = run.journal["ppo"] if "ppo" in run.journal else {"result": None}
    result = entry["result"] or {}
    return result[name] if name in result else None


def evaluation(run: Run) -> str:
    """All models on the held-out prompts."""
    found = run.evaluation
    if found is None:
        return ""
    there = [name for name in MODELS if name in found["models"]]
    rows = [
        [
            label,
            *(
                interval(found["models"][name][field], name=f"{name}_{field}", digits=digits)
                if field in found["models"][name]
                else ABSENT
                for name in there
            ),
        ]
        for field, label, digits in MEASURES
        if any(field in found["models"][name] for name in there)
    ]
    rows += [
        [f"distinct-{n}", *(number(found["models"][name][f"distinct_{n}"]) for name in there)]
        for n in (1, 2)
    ]
    rows.append(["without a score", *(number(found["models"][name]["unscored"]) for name in there)])
    losses = found["held_out_loss"]
    if losses:
        shown = [number(losses[name]["eval/loss"]) if name in losses else ABSENT for name in there]
        rows.append(["held-out loss (nats a token)", *shown])
    return section(
        "evaluation",
        "Evaluation on held-out prompts",
        table(["", *(NAMES[name] for name in there)], rows),
        table(
            ["", "score", "judge, overall", "characters"],
            [
                [_versus(pair), *(interval(fields[f]) for f in ("reward", "judge_overall"))]
                + [interval(fields["characters"], digits=1)]
                for pair, fields in found["differences"].items()
            ],
            caption="Differences on the same prompts",
        ),
        table(
            ["", "wins", "ties", "losses", "share of points", "orders disagree"],
            [
                [
                    _versus(pair),
                    *(number(won[name]) for name in ("wins", "ties", "losses")),
                    interval(won["share"]),
                    number(won["orders_disagree"]),
                ]
                for pair, won in found["win_rates"].items()
            ],
            caption=f"Judged in both orders by {text(found['judge'])}",
        ),
        paragraph(
            f"{found['num_prompts']} prompts, {found['sampling']['num_samples']} answers of each "
            f"model to each, drawn at temperature {found['sampling']['temperature']:g}.",
            *_other_temperature(found["sampling"]),
            "Intervals hold 95 % of a bootstrap over prompts; differences are taken prompt by "
            "prompt.",
        ),
    )


def _other_temperature(sampling: Mapping[str, Any]) -> list[str]:
    """That PPO sampled at another temperature, where it did; older runs do not tell."""
    rollouts = sampling["rollout_temperature"] if "rollout_temperature" in sampling else None
    if rollouts in (None, sampling["temperature"]):
        return []
    return [
        f"PPO sampled at temperature {rollouts:g}: rewards and KL here are not those that it was "
        "trained for."
    ]


def answers(run: Run, *, num_prompts: int) -> str:
    """The first answer of each model to the same prompts."""
    by_id = {name: {record["id"]: record for record in rows} for name, rows in run.answers.items()}
    shown = []
    ids = list(by_id["ppo"])
    wanted = [ids[index * len(ids) // num_prompts] for index in range(min(num_prompts, len(ids)))]
    for prompt_id in dict.fromkeys(wanted):
        record = by_id["ppo"][prompt_id]
        asked = turns((turn["role"], turn["content"]) for turn in record["messages"])
        boxes = "".join(
            _answer(NAMES[name], found[prompt_id])
            for name, found in by_id.items()
            if prompt_id in found
        )
        shown.append(f'<div class="prompt">{asked}<div class="answers">{boxes}</div></div>')
    if not shown:
        return ""
    told = paragraph(
        "The first answer of each model to some of the held-out prompts, chosen evenly and not by "
        "their looks. None of this is medical advice."
    )
    return section("answers", "Answers side by side", told, *shown)


def _answer(name: str, record: Mapping[str, Any]) -> str:
    first = record["answers"][0]
    ended = "finish_reason" not in first or first["finish_reason"] == "stop"
    said = "<em>(an empty answer)</em>" if is_empty(first["text"]) else text(first["text"])
    told = f"reward {number(record['rewards'][0])}" + (
        "" if ended else ", cut off at its length limit"
    )
    return f'<div class="answer"><h4>{text(name)}</h4><div>{said}</div><p>{told}</p></div>'


def _lengths_and_rewards(run: Run, name: str) -> tuple[list[float], list[float]]:
    lengths, rewards = [], []
    for record in run.answers[name]:
        for answer, reward in zip(record["answers"], record["rewards"], strict=True):
            if reward is not None:
                lengths.append(float(len(answer["text"])))
                rewards.append(float(reward))
    return lengths[:_MAX_POINTS], rewards[:_MAX_POINTS]


def _versus(pair: str) -> str:
    one, other = pair.split("_over_")
    return f"{NAMES[one]} over {NAMES[other]}"


def costs(run: Run) -> str:
    """Time and cost of each stage, settings and versions."""
    rows = [
        [
            text(name),
            seconds(entry["seconds"]),
            number(len(entry["starts"])),
            text(entry["finished"] or "not finished"),
        ]
        for name, entry in run.journal.items()
    ]
    parts = [
        table(
            ["stage", "time", "starts", "finished (UTC)"],
            rows,
            caption="Time of a start that was killed is not counted",
        )
    ]
    if run.labels is not None:
        parts += [_spent(part) for part in run.labels["judges"]]
    for name, entry in run.journal.items():
        settings = run.config[name]["settings"] if name in run.config else entry["settings"]
        lines = [[f"<code>{text(k)}</code>", f"<code>{text(v)}</code>"] for k, v in _flat(settings)]
        parts.append(details(f"Settings of {name}", table(["field", "value"], lines, words=True)))
    if run.environment is not None:
        parts.append(details("Versions and machine", _environment(run.environment)))
    return section("costs", "Time, cost, settings, versions", *parts)


def _spent(part: Mapping[str, Any]) -> str:
    cost = part["cost"]
    usage = ", ".join(f"{text(k)} {number(v, digits=0)}" for k, v in cost["usage"].items())
    return paragraph(
        f"Judge {text(part['judge'])}: cost {number(cost['money'], digits=4)}"
        + (f" and {cost['unknown']} judgements of unknown cost" if cost["unknown"] else "")
        + f"; tokens: {usage or 'none'}; failed {percent(part['failure_rate']['value'])}."
    )


def _environment(found: Mapping[str, Any]) -> str:
    devices = found["devices"]
    rows = [
        ["python", text(found["python"])],
        ["platform", text(found["platform"])],
        ["devices", f"{devices['number']} × {text(devices['kind'])}"],
        ["commit", text(found["git_commit"] or "not in git")],
        *([text(name), text(version)] for name, version in found["packages"].items()),
    ]
    return table(["", ""], rows, words=True)


def _flat(settings: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(settings, Mapping):
        return [
            line
            for name, value in settings.items()
            for line in _flat(value, f"{path}.{name}" if path else str(name))
        ]
    return [(path, settings)]
