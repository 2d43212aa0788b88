"""A whole consultation of a doctor with a simulated patient, and what became of it."""

from collections.abc import Callable
from dataclasses import dataclass

from huatuo_jax.clinic.findings import Diagnosis, Findings, find
from huatuo_jax.clinic.patient import Patient
from huatuo_jax.clinic.reading import heard
from huatuo_jax.clinic.world import Case, posterior
from huatuo_jax.data.records import Message, Prompt

Doctor = Callable[[tuple[Message, ...]], str]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a consultation.

    Attributes:
        diagnosis: of the last answer that names a disease, see `Findings.diagnosis`; "absent" where
            none does.
        best_possible: the probability of the most probable disease after all that was told.
        num_turns: answers of the doctor, the last one included.
        num_questions: useful ones among all questions.
        ended: the patient had advice and said goodbye.
        red_flag_missed: emergency care was needed after what was told, and no answer called for it.
        contraindicated: drugs and tests that were ordered for a patient who had told why not.
    """

    diagnosis: Diagnosis
    best_possible: float
    num_turns: int
    num_questions: int
    ended: bool
    red_flag_missed: bool
    contraindicated: tuple[str, ...]

    @property
    def right(self) -> bool:
        """Whether the diagnosis is right."""
        return self.diagnosis == "right"


@dataclass(frozen=True, kw_only=True)
class Consultation:
    """A consultation that came to its end, or to the limit of turns.

    Attributes:
        case: the truth.
        messages: role ("user" or "assistant") and text of each, the patient first and last.
        outcome: what became of it.
    """

    case: Case
    messages: tuple[Message, ...]
    outcome: Outcome


def consult(
    case: Case,
    doctor: Doctor,
    *,
    max_turns: int = 8,
    seed: int = 0,
    held_out: bool = True,
) -> Consultation:
    """A consultation of a doctor with the patient of a case.

    Args:
        case: the truth.
        doctor: gives the next answer to the messages so far.
        max_turns: answers of the doctor before the patient gives up.
        seed: as `Patient`.
        held_out: as `Patient`.
    """
    patient = Patient(case, seed=seed, held_out=held_out)
    messages: list[Message] = [Message("user", patient.open())]
    for _ in range(max_turns):
        answer = doctor(tuple(messages))
        messages += [Message("assistant", answer), Message("user", patient.reply(answer))]
        if patient.done:
            break
    outcome = outcome_of(case, tuple(messages), ended=patient.done)
    return Consultation(case=case, messages=tuple(messages), outcome=outcome)


def outcome_of(case: Case, messages: tuple[Message, ...], *, ended: bool) -> Outcome:
    """What became of a consultation.

    Args:
        case: the truth.
        messages: role and text of each.
        ended: whether the patient said goodbye.
    """
    found: list[Findings] = []
    for place, message in enumerate(messages):
        if message.role == "assistant":
            prompt = Prompt(
                id=case.id,
                messages=messages[:place],
                source="consultation",
                diagnosis=case.disease,
            )
            found.append(find(prompt, message.content))
    named = [finding.diagnosis for finding in found if finding.diagnosis != "absent"]
    belief = posterior(heard(messages))
    return Outcome(
        diagnosis=named[-1] if named else "absent",
        best_possible=belief.probabilities[belief.best],
        num_turns=len(found),
        num_questions=sum(finding.useful_questions for finding in found),
        ended=ended,
        red_flag_missed=belief.emergency and not any(finding.urgent for finding in found),
        contraindicated=tuple(
            dict.fromkeys(name for finding in found for name in finding.contraindicated)
        ),
    )
