"""Three consultations side by side, each in another situation, with what is true of each answer."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from huatuo_jax.clinic.findings import Findings, find, truth_of
from huatuo_jax.clinic.situations import Situation, conditions_against, situation
from huatuo_jax.data.records import Prompt, is_empty
from huatuo_jax.feedback.truth_judge import is_of_clinic
from huatuo_jax.report.markup import paragraph, section, text, turns
from huatuo_jax.report.run import Run

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
