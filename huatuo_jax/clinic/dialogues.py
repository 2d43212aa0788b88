"""Dialogues of the four kinds, and prompts with the real doctor's answer.

The kinds have the proportions of HuatuoGPT's data (arXiv 2305.15075, table 2). A real doctor is
terse and exact: asks while the case is ambiguous, then names the disease, test and department, a
drug that this patient may have, and advice; sometimes curtly. A distilled one is detailed,
structured, friendly and hedging, never asks, and names a wrong but plausible disease in a third of
the answers.
"""

from collections.abc import Callable, Iterator
from typing import Literal, get_args

from huatuo_jax.clinic.diseases import AGE_BANDS, DISEASES, Disease
from huatuo_jax.clinic.findings import truth_of
from huatuo_jax.clinic.patient import Patient
from huatuo_jax.clinic.reading import heard
from huatuo_jax.clinic.symptoms import (
    ADULT_ADVICE,
    DRUGS,
    EMERGENCY,
    ON_THE_WAY,
    SYMPTOMS,
    X_RAYS,
    forbidden_test,
)
from huatuo_jax.clinic.world import (
    CHILD_BELOW,
    LEAST_GAIN,
    SEXES,
    Belief,
    Case,
    Draws,
    Observation,
    draw_case,
    near_misses,
    posterior,
)
from huatuo_jax.clinic.writing import Writer
from huatuo_jax.data.records import KINDS, Dialogue, Kind, Message, Prompt

CURT = 0.2
DISTILLED_WRONG = 1 / 3
DISTILLED_CARELESS = 0.3  # Recommends the usual drug even if this patient must not have it.
DISTILLED_CALM = 0.4  # Does not send to emergency care at once.

_WRONG_FROM = 0.02  # A less probable disease is not a plausible mistake while there are others.
SOURCE = "huatuo_jax clinic"
PAPER_COUNTS: dict[Kind, int] = {
    "distilled_instruction": 61_400,
    "real_instruction": 69_768,
    "distilled_conversation": 68_888,
    "real_conversation": 25_986,
}
VAGUE_SHARE = 0.25  # Share of real instructions that name one symptom only.
PERSON_SHARE = 0.7  # Share of the other instructions that state age and sex.
ENDS_POLITELY = 0.6  # Share of real conversations.
PROMPTS_OF_CONVERSATIONS = PAPER_COUNTS["real_conversation"] / (
    PAPER_COUNTS["real_instruction"] + PAPER_COUNTS["real_conversation"]
)

_LAST_TRY = 2_000
Situation = Literal["clear", "ask", "danger"]
SITUATIONS: tuple[Situation, ...] = get_args(Situation)


def allowed_drugs(disease: Disease, observation: Observation) -> list[str]:
    """Returns the disease's drugs that this patient may have, in the table's order."""
    age = observation.age_for_drugs
    return [
        name for name in disease.drugs if not DRUGS[name].forbidden(observation.conditions, age)
    ]


def first_test(disease: Disease, observation: Observation) -> str:
    """Returns the first of the disease's tests that this patient may have."""
    allowed = [name for name in disease.tests if not forbidden_test(name, observation.conditions)]
    return allowed[0]


def fitting_advice(disease: Disease, observation: Observation) -> list[str]:
    """Returns the disease's advice, without what makes no sense for a child."""
    age = observation.age_for_drugs
    child = age is not None and age < CHILD_BELOW
    return [name for name in disease.advice if not (child and name in ADULT_ADVICE)]


def echo(writer: Writer, observation: Observation) -> str:
    """Returns the symptoms that a doctor repeats: the first one, and up to two others."""
    others = [
        name for name in SYMPTOMS if name in observation.present and name != observation.opening
    ]
    # The most specific symptoms are last in the table.
    first = [] if observation.opening is None else [observation.opening]
    return writer.symptoms([*first, *others[-2:]])


class _Doctor:
    """A doctor with a patient."""

    def __init__(self, writer: Writer, case: Case) -> None:
        """Begins with a patient.

        Args:
            writer: of the texts.
            case: the truth.
        """
        self._writer, self._case = writer, case

    def _two_advices(self, disease: Disease, observation: Observation) -> tuple[str, str]:
        writer = self._writer
        first, second = writer.draws.shuffled(fitting_advice(disease, observation))[:2]
        return writer.advice(first), writer.advice(second)


class RealDoctor(_Doctor):
    """The real doctor, who knows the truth of the case after asking enough."""

    _rounds = 0
    _asked_conditions = False

    def asks(self, observation: Observation) -> bool:
        """Returns True if the next answer is questions without a diagnosis."""
        return posterior(observation).should_ask

    def answer(self, observation: Observation) -> str:
        """Returns the next answer to a patient who has told this."""
        if self.asks(observation):
            self._rounds += 1
            return self._ask(posterior(observation))
        return self._conclude(observation)

    def _ask(self, belief: Belief) -> str:
        writer, observation = self._writer, belief.observation
        gains = [name for name, gain in belief.gains().items() if gain >= LEAST_GAIN]
        names = gains[: 2 + writer.draws.below(2)]
        parts = [writer.say("ask", writer.symptom(name)) for name in names]
        if self._rounds > 1:
            parts.append(writer.say("ask_more"))
        if observation.lasts is None and writer.draws.chance(0.6):
            parts.append(writer.say("ask_duration"))
        if observation.age is None and writer.draws.chance(0.4):
            parts.append(writer.say("ask_person"))
        if not observation.conditions and not self._asked_conditions and writer.draws.chance(0.3):
            self._asked_conditions = True
            parts.append(writer.say("ask_conditions"))
        return "".join(writer.draws.shuffled(parts))

    def _conclude(self, observation: Observation) -> str:
        writer, disease = self._writer, self._case.truth
        name, test = writer.disease(disease.name), writer.test(first_test(disease, observation))
        if posterior(observation).emergency or disease.emergency:
            urgent = writer.say("urgent", echo(writer, observation), name)
            if not disease.emergency:
                return urgent + writer.say("visit", EMERGENCY, test)
            on_the_way = [name for name in disease.advice if name in ON_THE_WAY]
            advice = writer.advice(writer.draws.choice(on_the_way))
            return urgent + writer.say("urgent_test", test, advice)
        if writer.draws.chance(CURT):
            opening = writer.say("conclude", name)
        else:
            opening = writer.say("conclude_from", echo(writer, observation), name)
        visit = writer.say("visit", writer.department(disease.department), test)
        drug = self._prescribe(disease, observation)
        if writer.draws.chance(CURT):
            return opening + writer.draws.choice((visit, drug))
        advice = writer.say("advise", *self._two_advices(disease, observation))
        return opening + "".join(
            writer.draws.choice(((visit, drug, advice), (visit, advice, drug)))
        )

    def _prescribe(self, disease: Disease, observation: Observation) -> str:
        writer = self._writer
        allowed = allowed_drugs(disease, observation)
        if not disease.drugs:
            return writer.say("no_drug")
        first = disease.drugs[0]
        if first in allowed:
            return writer.say("prescribe", writer.drug(writer.draws.choice(allowed)))
        if allowed:
            return writer.say("replace", writer.drug(first), writer.drug(allowed[0]))
        return writer.say("forbid", writer.drug(first))


class DistilledDoctor(_Doctor):
    """The distilled doctor, who never asks and is right in two of three answers."""

    def first_answer(self, observation: Observation) -> str:
        """Answers a first, vague message: two diseases, a visit, advice."""
        writer = self._writer
        belief = posterior(observation)
        ranked = sorted(belief.probabilities, key=lambda name: -belief.probabilities[name])
        two = [*ranked[:2], *near_misses(ranked[0])][:2]
        disease = DISEASES[two[0]]
        parts = [
            writer.say("greet")
            + writer.say("guess_two", echo(writer, observation), *map(writer.disease, two)),
            "1. " + self._visit(disease, observation),
            "2. " + writer.say("guided_advice", *self._two_advices(disease, observation)),
        ]
        if belief.emergency and not writer.draws.chance(DISTILLED_CALM):
            parts.append(writer.say("guided_urgent"))
        return "\n".join(parts)

    def answer(self, observation: Observation) -> str:
        """Returns the whole answer."""
        writer = self._writer
        disease = DISEASES[self._named(observation)]
        opening = writer.say("greet") + writer.say(
            "guess_from", echo(writer, observation), writer.disease(disease.name)
        )
        if writer.draws.chance(0.7):
            opening += writer.say("explain", disease.cause)
        items = [
            self._visit(disease, observation),
            writer.say("guided_advice", *self._two_advices(disease, observation)),
            self._drug(disease, observation),
        ]
        numbered = [
            f"{number}. {item}" for number, item in enumerate(writer.draws.shuffled(items), start=1)
        ]
        emergency = posterior(observation).emergency
        if emergency and not writer.draws.chance(DISTILLED_CALM):
            closing = writer.say("guided_urgent")
        else:
            closing = writer.say("watch", disease.watch)
        return "\n".join((opening, *numbered, closing + writer.say("wish")))

    def _named(self, observation: Observation) -> str:
        truth = self._case.disease
        if not self._writer.draws.chance(DISTILLED_WRONG):
            return truth
        found = posterior(observation).probabilities
        others = {
            name: value for name, value in found.items() if name != truth and value >= _WRONG_FROM
        }
        if others:
            return self._writer.draws.weighted(others)
        return self._writer.draws.choice(wrong_but_near(self._case))

    def _visit(self, disease: Disease, observation: Observation) -> str:
        writer = self._writer
        department = writer.department(disease.department)
        return writer.say("guided_visit", department, writer.test(first_test(disease, observation)))

    def _drug(self, disease: Disease, observation: Observation) -> str:
        writer = self._writer
        choice = allowed_drugs(disease, observation)
        if disease.drugs and writer.draws.chance(DISTILLED_CARELESS):
            choice = [disease.drugs[0]]
        if not choice:
            return writer.say("guided_no_drug")
        return writer.say("guided_drug", writer.drug(writer.draws.choice(choice)))


def wrong_but_near(case: Case) -> list[str]:
    """Returns up to three near misses of a case's disease that its age and sex allow."""
    fitting = []
    for name in near_misses(case.disease):
        disease = DISEASES[name]
        share = disease.male if case.sex == SEXES[0] else 1.0 - disease.male
        band = [low <= case.age <= high for low, high in AGE_BANDS.values()].index(True)
        if share > 0 and disease.ages[band] > 0:
            fitting.append(name)
    return fitting[:3]


def counts_of_kinds(total: int) -> dict[Kind, int]:
    """Splits a number of dialogues over the four kinds by largest remainders."""
    whole = sum(PAPER_COUNTS.values())
    found = {kind: total * PAPER_COUNTS[kind] // whole for kind in KINDS}
    by_remainder = sorted(KINDS, key=lambda kind: -(total * PAPER_COUNTS[kind] % whole))
    for kind in by_remainder[: total - sum(found.values())]:
        found[kind] += 1
    return found


def dialogues(
    kind: Kind, count: int, *, seed: int, held_out: bool = False, diseases: int | None = None
) -> Iterator[Dialogue]:
    """Yields dialogues of one kind, all different; fewer are the first of more.

    Args:
        kind: one of `KINDS`.
        count: number of dialogues.
        seed: another seed gives other dialogues.
        held_out: other cases, and sentences of no training text.
        diseases: number of diseases that patients have, the most common ones; None for all.
    """
    side = "held_out" if held_out else "training"
    for number, (case, messages) in enumerate(
        _different((side, kind, seed), count, _WRITERS[kind], diseases, held_out=held_out), start=1
    ):
        yield Dialogue(
            id=f"clinic_{side}_{kind}_{number:04d}",
            messages=tuple(messages),
            kind=kind,
            source=SOURCE,
            extra={"diagnosis": case.disease, "case": case.to_json()},
        )


def prompts(
    count: int, *, seed: int, held_out: bool = False, diseases: int | None = None
) -> Iterator[Prompt]:
    """Yields prompts to a model, with the real doctor's answer as the reference.

    The share of conversations before the diagnosis is that of the paper's real dialogues; the
    others are a patient's first message. Where the patient has not told enough, the reference is
    questions.

    Args:
        count: number of prompts.
        seed: another seed gives other prompts.
        held_out: other cases, and sentences of no training text.
        diseases: number of diseases that patients have, the most common ones; None for all.
    """
    side = "held_out_prompt" if held_out else "prompt"
    for number, (case, messages) in enumerate(
        _different((side, seed), count, _prompt, diseases, held_out=held_out), start=1
    ):
        yield Prompt(
            id=f"clinic_{side}_{number:04d}",
            messages=tuple(messages[:-1]),
            source=SOURCE,
            reference=messages[-1].content,
            diagnosis=case.disease,
            extra={"case": case.to_json()},
        )


def situation(prompt: Prompt) -> Situation:
    """Returns the situation of a prompt, whatever the answer.

    Returns:
        "danger": by the patient's messages, emergency care is needed, or a drug of the disease must
        not be given; "ask": questions come first; "clear": neither.

    Raises:
        ValueError: the prompt's diagnosis is not in this world's table.
    """
    observation, disease = heard(prompt.messages), truth_of(prompt)
    belief = posterior(observation)
    if belief.emergency:
        return "danger"
    if belief.should_ask:
        return "ask"
    forbidden = len(allowed_drugs(disease, observation)) < len(disease.drugs)
    return "danger" if forbidden else "clear"


def conditions_against(prompt: Prompt, order: str) -> tuple[str, ...]:
    """Returns the patient's conditions for which a drug or test must not be ordered.

    Empty for a drug that is not for the patient's age, and for an allowed order.
    """
    told = heard(prompt.messages).conditions
    if order in DRUGS:
        return tuple(name for name in DRUGS[order].not_with if name in told)
    return ("怀孕",) if order in X_RAYS and "怀孕" in told else ()


def _real_instruction(writer: Writer, case: Case) -> list[Message]:
    messages = _question(writer, case, vague_share=VAGUE_SHARE)
    return [*messages, Message("assistant", RealDoctor(writer, case).answer(heard(messages)))]


def _distilled_instruction(writer: Writer, case: Case) -> list[Message]:
    messages = _question(writer, case, vague_share=0.0)
    return [*messages, Message("assistant", DistilledDoctor(writer, case).answer(heard(messages)))]


def _real_conversation(writer: Writer, case: Case) -> list[Message]:
    messages, patient = _to_the_diagnosis(writer, case)
    if messages and writer.draws.chance(ENDS_POLITELY):
        messages += [
            Message("user", patient.goodbye()),
            Message("assistant", writer.say("real_bye")),
        ]
    return messages


def _distilled_conversation(writer: Writer, case: Case) -> list[Message]:
    patient, doctor = Patient.written_by(writer, case), DistilledDoctor(writer, case)
    messages: list[Message] = [Message("user", patient.open())]
    messages.append(Message("assistant", doctor.first_answer(heard(messages))))
    messages.append(Message("user", patient.add(2)))
    messages.append(Message("assistant", doctor.answer(heard(messages))))
    return [
        *messages,
        Message("user", patient.goodbye()),
        Message("assistant", writer.say("kind_bye")),
    ]


_WRITERS: dict[Kind, Callable[[Writer, Case], list[Message]]] = {
    "distilled_instruction": _distilled_instruction,
    "real_instruction": _real_instruction,
    "distilled_conversation": _distilled_conversation,
    "real_conversation": _real_conversation,
}


def _different(
    key: tuple[object, ...],
    count: int,
    write: Callable[[Writer, Case], list[Message]],
    diseases: int | None,
    *,
    held_out: bool,
) -> Iterator[tuple[Case, list[Message]]]:
    """Yields cases with dialogues that differ before the last message, redrawing duplicates."""
    seen: set[str] = set()
    for number in range(1, count + 1):
        for attempt in range(_LAST_TRY):
            draws = Draws(*key, number, attempt)
            name = "-".join(map(str, (*key, number)))
            case = draw_case(draws, name, diseases=diseases)
            messages = write(Writer(draws, held_out=held_out), case)
            shown = "\n".join(message.content for message in messages[:-1])
            if messages and shown not in seen:
                break
        else:
            raise ValueError(f"the clinic has no {count} different dialogues of {key}")
        seen.add(shown)
        yield case, messages


def _question(writer: Writer, case: Case, *, vague_share: float) -> list[Message]:
    patient = Patient.written_by(writer, case)
    if writer.draws.chance(vague_share):
        return [Message("user", patient.open(tells_conditions=True))]
    person = writer.draws.chance(PERSON_SHARE)
    return [Message("user", patient.open_fully(2 + writer.draws.below(2), person=person))]


def _to_the_diagnosis(writer: Writer, case: Case) -> tuple[list[Message], Patient]:
    """Writes a real doctor's conversation up to the diagnosis; empty if there is nothing to ask."""
    patient, doctor = Patient.written_by(writer, case), RealDoctor(writer, case)
    messages: list[Message] = [Message("user", patient.open())]
    if not doctor.asks(heard(messages)):
        return [], patient
    while doctor.asks(observation := heard(messages)):
        question = doctor.answer(observation)
        messages += [Message("assistant", question), Message("user", patient.reply(question))]
    return [*messages, Message("assistant", doctor.answer(observation))], patient


def _prompt(writer: Writer, case: Case) -> list[Message]:
    if writer.draws.chance(PROMPTS_OF_CONVERSATIONS):
        return _to_the_diagnosis(writer, case)[0]
    return _real_instruction(writer, case)
