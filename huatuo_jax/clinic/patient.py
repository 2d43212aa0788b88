"""A simulated patient of this world, and consultations of a doctor with it.

The patient begins vaguely, answers questions from the case, mentions what must not be overlooked (a
pregnancy, an allergy) in the first reply at the latest, and says 再见 once there is advice.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from huatuo_jax.clinic.findings import Diagnosis, Findings, find
from huatuo_jax.clinic.reading import asked, calls_emergency, heard, read
from huatuo_jax.clinic.world import Case, Draws, posterior, told_in_order
from huatuo_jax.clinic.writing import Writer
from huatuo_jax.data.records import Message, Prompt

ADVICE_KINDS = ("disease", "test", "department", "advice", "drug")
TELLS_CONDITION_FIRST = 0.5
Doctor = Callable[[tuple[Message, ...]], str]


class Patient:
    """One patient in one consultation, who remembers the messages so far."""

    def __init__(self, case: Case, *, seed: int = 0, held_out: bool = False) -> None:
        """Begins a consultation.

        Args:
            case: the truth.
            seed: of the wording, and of the order of the symptoms.
            held_out: use the wording of held-out texts.
        """
        self._start(case, Writer(Draws("patient", seed, case.id), held_out=held_out))

    @classmethod
    def written_by(cls, writer: Writer, case: Case) -> "Patient":
        """Makes a patient who uses a writer that others use too."""
        patient = cls.__new__(cls)
        patient._start(case, writer)
        return patient

    def _start(self, case: Case, writer: Writer) -> None:
        self.case, self.done = case, False
        self._writer = writer
        self._who = "孩子" if case.child else ""
        self._untold = list(told_in_order(writer.draws, case))
        self._conditions = list(case.conditions)

    @property
    def sex(self) -> str:
        """Returns the word for the patient's sex."""
        return f"{self.case.sex}孩" if self.case.child else self.case.sex

    def open(self, *, tells_conditions: bool | None = None) -> str:
        """Returns the first message, which names one symptom.

        Args:
            tells_conditions: mention a pregnancy or an allergy; None decides by chance.
        """
        text = self._writer.say("vague", self._who, self._writer.symptom(self._untold.pop(0)))
        if tells_conditions is None:
            tells_conditions = self._writer.draws.chance(TELLS_CONDITION_FIRST)
        if tells_conditions:
            text += self._tell_conditions()
        return text

    def open_fully(self, count: int, *, person: bool) -> str:
        """Returns the first message of a patient who tells much at once.

        Args:
            count: number of symptoms, at least 2.
            person: state age and sex.
        """
        writer, case = self._writer, self.case
        first = writer.symptom(self._untold.pop(0))
        others = writer.symptoms([self._untold.pop(0) for _ in range(count - 1)])
        if person:
            text = writer.say("full", self._who, str(case.age), self.sex, first, others, case.since)
        else:
            text = writer.say("since", self._who, first, others, case.since)
        return text + self._tell_conditions()

    def add(self, count: int) -> str:
        """Returns a further, unprompted message with up to `count` new symptoms."""
        told = [self._untold.pop(0) for _ in range(min(count, len(self._untold)))]
        writer = self._writer
        text = writer.say("more", self._who, writer.symptoms(told), self.case.since)
        return text + self._tell_conditions()

    def goodbye(self) -> str:
        """Returns the last message."""
        self.done = True
        return self._writer.say("thanks")

    def reply(self, doctor: str) -> str:
        """Replies to a doctor's message; ends the consultation once there is advice.

        A question about something outside this world is answered with "说不清楚".
        """
        questions = asked(doctor)
        if questions.anything:
            return self._answers(questions.symptoms, questions.topics) + self._tell_conditions()
        named = {mention.kind for sentence in read(doctor) for mention in sentence.mentions}
        if named & set(ADVICE_KINDS) or calls_emergency(doctor):
            return self.goodbye()
        return self._writer.say("lost")

    def _answers(self, symptoms: Sequence[str], topics: frozenset[str]) -> str:
        writer, case = self._writer, self.case
        parts = []
        for name in symptoms:
            has = name in case.symptoms
            parts.append(writer.say("yes" if has else "no", writer.symptom(name)))
            if name in self._untold:
                self._untold.remove(name)
        if "duration" in topics:
            parts.append(writer.say("duration", case.since))
        if topics & {"age", "sex"}:
            parts.append(writer.say("person", str(case.age), self.sex))
        if "more" in topics:
            parts.append(self._one_more())
        if "conditions" in topics and not case.conditions:
            parts.append(writer.say("healthy"))
        if not parts and not self._conditions:
            parts.append(writer.say("unsure"))
        return "".join(parts)

    def _one_more(self) -> str:
        if not self._untold:
            return self._writer.say("nothing_more")
        return self._writer.say("one_more", self._writer.symptom(self._untold.pop(0)))

    def _tell_conditions(self) -> str:
        told = [
            self._writer.say("condition", self._who, self._writer.condition(name))
            for name in self._conditions
        ]
        self._conditions = []
        return "".join(told)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The outcome of a consultation.

    Attributes:
        diagnosis: of the last answer that names a disease, see `Findings.diagnosis`; "absent" where
            none does.
        best_possible: the probability of the most probable disease given all messages.
        num_turns: answers of the doctor, the last one included.
        num_questions: useful ones among all questions.
        ended: the patient had advice and said goodbye.
        red_flag_missed: emergency care was needed by the messages, and no answer called for it.
        contraindicated: drugs and tests that were ordered although the patient had told why not.
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
        """Returns True if the diagnosis is right."""
        return self.diagnosis == "right"


@dataclass(frozen=True, kw_only=True)
class Consultation:
    """A consultation that ended, or reached the limit of turns.

    Attributes:
        case: the truth.
        messages: role ("user" or "assistant") and text of each, the patient first and last.
        outcome: its outcome.
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
    """Runs a consultation of a doctor with the patient of a case.

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
    """Evaluates a consultation.

    Args:
        case: the truth.
        messages: role and text of each.
        ended: the patient said goodbye.
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
