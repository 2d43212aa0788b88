"""A simulated patient of this world.

The patient begins vaguely, answers what is asked from the case, tells what must not be overlooked
(a pregnancy, an allergy) at the first reply at the latest, and says 再见 when there is advice.
"""

from collections.abc import Sequence

from huatuo_jax.clinic.draws import Draws
from huatuo_jax.clinic.reading import asked, calls_emergency, read
from huatuo_jax.clinic.world import Case, told_in_order
from huatuo_jax.clinic.writing import Writer

ADVICE_KINDS = ("disease", "test", "department", "advice", "drug")
TELLS_CONDITION_FIRST = 0.5


class Patient:
    """One patient in one consultation; it remembers what it has told."""

    def __init__(self, case: Case, *, seed: int = 0, held_out: bool = False) -> None:
        """Start a consultation.

        Args:
            case: the truth.
            seed: of the wording, and of which symptoms come first.
            held_out: use the wording of held-out texts.
        """
        self._start(case, Writer(Draws("patient", seed, case.id), held_out=held_out))

    @classmethod
    def written_by(cls, writer: Writer, case: Case) -> "Patient":
        """A patient who speaks through a writer that others use, too."""
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
        """The word for the patient's sex."""
        return f"{self.case.sex}孩" if self.case.child else self.case.sex

    def open(self, *, tells_conditions: bool | None = None) -> str:
        """The first message, which names one symptom.

        Args:
            tells_conditions: whether it tells of a pregnancy or an allergy; by chance where None.
        """
        text = self._writer.say("vague", self._who, self._writer.symptom(self._untold.pop(0)))
        if tells_conditions is None:
            tells_conditions = self._writer.draws.chance(TELLS_CONDITION_FIRST)
        if tells_conditions:
            text += self._tell_conditions()
        return text

    def open_fully(self, count: int, *, person: bool) -> str:
        """The first message of a patient who tells much at once.

        Args:
            count: how many symptoms, 2 at least.
            person: whether the patient states age and sex.
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
        """A further message that nobody asked for, with up to so many new symptoms."""
        told = [self._untold.pop(0) for _ in range(min(count, len(self._untold)))]
        writer = self._writer
        text = writer.say("more", self._who, writer.symptoms(told), self.case.since)
        return text + self._tell_conditions()

    def goodbye(self) -> str:
        """The last message."""
        self.done = True
        return self._writer.say("thanks")

    def reply(self, doctor: str) -> str:
        """What the patient says to a doctor's message; ends the consultation where there is advice.

        A question about something that this world does not have is answered with "说不清楚".
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
