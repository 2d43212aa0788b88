"""The two manners of this world's doctors: real ones and distilled ones.

A real doctor is terse and exact: asks while it is ambiguous what the patient has, then names the
disease, test and department, a drug that this patient may have, and advice; sometimes curtly. A
distilled one is detailed, structured, friendly and hedging, never asks, and names a wrong but
plausible disease in a third of the answers.
"""

from huatuo_jax.clinic.care import (
    ADULT_ADVICE,
    DRUGS,
    EMERGENCY,
    ON_THE_WAY,
    forbidden_test,
)
from huatuo_jax.clinic.diseases import AGE_BANDS, DISEASES, Disease
from huatuo_jax.clinic.symptoms import SYMPTOMS
from huatuo_jax.clinic.world import (
    CHILD_BELOW,
    LEAST_GAIN,
    SEXES,
    Belief,
    Case,
    Observation,
    near_misses,
    posterior,
)
from huatuo_jax.clinic.writing import Writer

CURT = 0.2
DISTILLED_WRONG = 1 / 3
DISTILLED_CARELESS = 0.3  # Recommends the usual drug although this patient must not have it.
DISTILLED_CALM = 0.4  # Does not send to emergency care at once.

_WRONG_FROM = 0.02  # A disease less probable is no plausible mistake while there are others.


def allowed_drugs(disease: Disease, observation: Observation) -> list[str]:
    """The disease's drugs that a patient of whom this is known may have, in the table's order."""
    age = observation.age_for_drugs
    return [
        name for name in disease.drugs if not DRUGS[name].forbidden(observation.conditions, age)
    ]


def first_test(disease: Disease, observation: Observation) -> str:
    """The first of the disease's tests that a patient of whom this is known may have."""
    allowed = [name for name in disease.tests if not forbidden_test(name, observation.conditions)]
    return allowed[0]


def fitting_advice(disease: Disease, observation: Observation) -> list[str]:
    """The disease's advice, without what makes no sense for a child."""
    age = observation.age_for_drugs
    child = age is not None and age < CHILD_BELOW
    return [name for name in disease.advice if not (child and name in ADULT_ADVICE)]


def echo(writer: Writer, observation: Observation) -> str:
    """What a doctor takes up of what the patient told: the first symptom, and up to two others."""
    others = [
        name for name in SYMPTOMS if name in observation.present and name != observation.opening
    ]
    # Those that say more about a complaint stand last in the table, and tell most.
    first = [] if observation.opening is None else [observation.opening]
    return writer.symptoms([*first, *others[-2:]])


class RealDoctor:
    """Knows the truth of the case once he has asked enough."""

    def __init__(self, writer: Writer, case: Case) -> None:
        """See a patient.

        Args:
            writer: of the texts.
            case: the truth.
        """
        self._writer, self._case = writer, case
        self._rounds = 0
        self._asked_conditions = False

    def asks(self, observation: Observation) -> bool:
        """Whether the next answer is questions and no diagnosis."""
        return posterior(observation).should_ask

    def answer(self, observation: Observation) -> str:
        """The next answer to a patient who has told this."""
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
        advice = writer.say("advise", *_two_advices(writer, disease, observation))
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


class DistilledDoctor:
    """Never asks; does not know the truth better than two times in three."""

    def __init__(self, writer: Writer, case: Case) -> None:
        """See a patient.

        Args:
            writer: of the texts.
            case: the truth.
        """
        self._writer, self._case = writer, case

    def first_answer(self, observation: Observation) -> str:
        """The answer to a first, vague message: two diseases, a visit, advice."""
        writer = self._writer
        belief = posterior(observation)
        ranked = sorted(belief.probabilities, key=lambda name: -belief.probabilities[name])
        two = [*ranked[:2], *near_misses(ranked[0])][:2]
        disease = DISEASES[two[0]]
        parts = [
            writer.say("greet")
            + writer.say("guess_two", echo(writer, observation), *map(writer.disease, two)),
            "1. " + self._visit(disease, observation),
            "2. " + writer.say("guided_advice", *_two_advices(writer, disease, observation)),
        ]
        if belief.emergency and not writer.draws.chance(DISTILLED_CALM):
            parts.append(writer.say("guided_urgent"))
        return "\n".join(parts)

    def answer(self, observation: Observation) -> str:
        """The whole answer."""
        writer = self._writer
        disease = DISEASES[self._named(observation)]
        opening = writer.say("greet") + writer.say(
            "guess_from", echo(writer, observation), writer.disease(disease.name)
        )
        if writer.draws.chance(0.7):
            opening += writer.say("explain", disease.cause)
        items = [
            self._visit(disease, observation),
            writer.say("guided_advice", *_two_advices(writer, disease, observation)),
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
    """Up to three near misses of a case's disease that its age and sex allow."""
    fitting = []
    for name in near_misses(case.disease):
        disease = DISEASES[name]
        share = disease.male if case.sex == SEXES[0] else 1.0 - disease.male
        band = [low <= case.age <= high for low, high in AGE_BANDS.values()].index(True)
        if share > 0 and disease.ages[band] > 0:
            fitting.append(name)
    return fitting[:3]


def _two_advices(writer: Writer, disease: Disease, observation: Observation) -> tuple[str, str]:
    first, second = writer.draws.shuffled(fitting_advice(disease, observation))[:2]
    return writer.advice(first), writer.advice(second)
