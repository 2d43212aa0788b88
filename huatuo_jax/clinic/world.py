"""Cases of this world, the posterior over diseases, and reproducible random draws.

A case is drawn from the table: a disease by its weight, then age, sex, duration and each symptom by
its probability, independent of each other given the disease. It is drawn again while it has fewer
than `LEAST_SYMPTOMS`, or none that can open a consultation. A patient first names one of the
symptoms that can open a consultation, each equally likely, then any of the others, each equally
likely. So every dialogue has an exact probability under each disease, and Bayes' rule gives the
probability of each disease: no doctor can be right more often than the most probable one is.

Not counted as evidence: that a patient does not mention a pregnancy, an allergy or another disease.
A symptom told unasked after questions counts as if it had been told before them.

Every draw is a SHA-256 of a key and a counter, and so is the same on every machine and every
version of Python: `random` promises this for few of its methods, and `hash` for no text.
"""

import dataclasses
import functools
import hashlib
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from huatuo_jax.clinic.diseases import AGE_BANDS, DISEASES, DURATIONS, Disease
from huatuo_jax.clinic.symptoms import CONDITIONS, SYMPTOMS

T = TypeVar("T")

_BITS = 53  # Those that a float holds exactly.
LEAST_SYMPTOMS = 3
# Below this probability of the best diagnosis a doctor should ask before naming one.
AMBIGUOUS_BELOW = 0.6
# A disease of at least this probability is worth naming.
PLAUSIBLE_FROM = 0.1
# A patient with at least this probability of an emergency is sent to emergency care.
EMERGENCY_FROM = 0.5
# A question with a smaller gain (see `Belief.gains`) is not worth asking.
LEAST_GAIN = 0.02

SEXES = ("男", "女")
CHILD_BELOW = 13
PREGNANCY_AGES = (18, 45)
CONDITION_SHARE = 0.2
PREGNANT_SHARE = 0.12

_SPANS = {"hours": (1, 12), "days": (1, 6), "weeks": (1, 3), "months": (1, 11)}
_UNITS = {"hours": "小时", "days": "天", "weeks": "周", "months": "个月"}
# Probability of a symptom that the table does not list, used only where no disease fits at all.
_SURPRISE = 0.01


class Draws:
    """A stream of draws that depends on its key alone."""

    def __init__(self, *key: object) -> None:
        """Begins a stream.

        Args:
            key: texts and whole numbers; streams of different keys are independent.
        """
        self._key = "\x1f".join(str(part) for part in key)
        self._count = 0

    def unit(self) -> float:
        """Draws a number from 0 (included) to 1 (excluded)."""
        self._count += 1
        return fraction(f"{self._key}\x1e{self._count}")

    def below(self, count: int) -> int:
        """Draws a whole number from 0 to `count` - 1."""
        assert count > 0
        return int(self.unit() * count)

    def chance(self, probability: float) -> bool:
        """Returns True with this probability."""
        return self.unit() < probability

    def choice(self, items: Sequence[T]) -> T:
        """Draws one of the items, all equally likely."""
        return items[self.below(len(items))]

    def weighted(self, weights: Mapping[T, float]) -> T:
        """Draws one of the keys in proportion to the weights, which need not sum to 1."""
        # Not `sum`, which rounds differently from Python 3.12 on.
        left = self.unit() * math.fsum(weights.values())
        for item, weight in weights.items():
            left -= weight
            if left < 0:
                return item
        return [item for item, weight in weights.items() if weight > 0][-1]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """Returns the items in a random order (Fisher and Yates)."""
        found = list(items)
        for last in range(len(found) - 1, 0, -1):
            other = self.below(last + 1)
            found[last], found[other] = found[other], found[last]
        return found

    def gaussian(self) -> float:
        """Draws from the standard normal distribution."""
        return statistics.NormalDist().inv_cdf(max(self.unit(), 0.5**_BITS))


def fraction(text: str) -> float:
    """Returns a number in [0, 1) computed from a hash of the text."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return (int.from_bytes(digest[:8], "big") >> (64 - _BITS)) / 2**_BITS


def number(text: str) -> int:
    """Returns a large whole number computed from a hash of the text."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A patient and the truth about the case.

    Attributes:
        id: of the case.
        disease: a name of the table.
        age: in years.
        sex: one of `SEXES`.
        since: the duration in the patient's words ("3天").
        lasts: the same as one of `DURATIONS`.
        symptoms: names, in the order of the table of symptoms.
        conditions: keys of `CONDITIONS`.
    """

    id: str
    disease: str
    age: int
    sex: str
    since: str
    lasts: str
    symptoms: tuple[str, ...]
    conditions: tuple[str, ...] = ()

    @property
    def child(self) -> bool:
        """Returns True if a parent speaks for the patient."""
        return self.age < CHILD_BELOW

    @property
    def truth(self) -> Disease:
        """Returns the row of the table."""
        return DISEASES[self.disease]

    def to_json(self) -> dict[str, Any]:
        """Returns plain values, as in a record's `case`."""
        lists = {"symptoms": list(self.symptoms), "conditions": list(self.conditions)}
        return dataclasses.asdict(self) | lists

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "Case":
        """Returns the case that `to_json` wrote.

        Raises:
            ValueError: a field is missing or unknown, or holds a name outside this world.
        """
        names = tuple(field.name for field in dataclasses.fields(cls))
        if sorted(row) != sorted(names):
            raise ValueError(f"a case has the fields {', '.join(names)}; this one {sorted(row)}")
        found = (
            ([row["disease"]], DISEASES),
            ([row["sex"]], SEXES),
            ([row["lasts"]], DURATIONS),
            (row["symptoms"], SYMPTOMS),
            (row["conditions"], CONDITIONS),
        )
        unknown = [name for some, known in found for name in some if name not in known]
        if unknown:
            raise ValueError(f"case {row['id']!r}: the clinic has no {unknown[0]!r}")
        fields = {**row, "symptoms": tuple(row["symptoms"]), "conditions": tuple(row["conditions"])}
        return cls(**fields)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Observation:
    """The information from a patient.

    Attributes:
        opening: the symptom named first.
        volunteered: symptoms told unasked after it.
        confirmed: symptoms that the patient was asked about, and has.
        denied: symptoms that the patient does not have.
        age: in years; None if unknown.
        child: a parent speaks, and the patient is below `CHILD_BELOW`; None if unknown.
        sex: one of `SEXES`, or None.
        lasts: one of `DURATIONS`, or None.
        conditions: those told.
    """

    opening: str | None = None
    volunteered: frozenset[str] = frozenset()
    confirmed: frozenset[str] = frozenset()
    denied: frozenset[str] = frozenset()
    age: int | None = None
    child: bool | None = None
    sex: str | None = None
    lasts: str | None = None
    conditions: frozenset[str] = frozenset()

    @property
    def present(self) -> frozenset[str]:
        """Returns all symptoms told."""
        opening = frozenset() if self.opening is None else frozenset((self.opening,))
        return opening | self.volunteered | self.confirmed

    @property
    def age_for_drugs(self) -> int | None:
        """Returns the age, or the largest age of a child whose age is unknown."""
        return CHILD_BELOW - 1 if self.age is None and self.child else self.age

    @property
    def known(self) -> frozenset[str]:
        """Returns all symptoms told or denied."""
        return self.present | self.denied


class Belief:
    """The probability of each disease, given what a patient has told."""

    def __init__(self, probabilities: Mapping[str, float], observation: Observation) -> None:
        """Sets the fields.

        Args:
            probabilities: the positive ones, by disease; they sum to 1.
            observation: the information that they follow from.
        """
        self.probabilities = probabilities
        self.observation = observation

    @property
    def best(self) -> str:
        """Returns the most probable disease; of equals the first in the table."""
        return max(self.probabilities, key=self.probabilities.__getitem__)

    @property
    def ambiguous(self) -> bool:
        """Returns True if a doctor should ask before naming a disease."""
        return self.probabilities[self.best] < AMBIGUOUS_BELOW

    @functools.cached_property
    def should_ask(self) -> bool:
        """Returns True if it is ambiguous, not an emergency, and a question is worth asking."""
        if not self.ambiguous or self.emergency:
            return False
        return max(self.gains().values(), default=0.0) >= LEAST_GAIN

    @property
    def plausible(self) -> tuple[str, ...]:
        """Returns the diseases worth naming, the most probable first."""
        found = [name for name, value in self.probabilities.items() if value >= PLAUSIBLE_FROM]
        return tuple(sorted(found, key=lambda name: -self.probabilities[name]))

    @property
    def emergency(self) -> bool:
        """Returns True if there is a red flag, or an emergency is probable."""
        flagged = any(SYMPTOMS[name].red_flag for name in self.observation.present)
        weight = math.fsum(
            value for name, value in self.probabilities.items() if DISEASES[name].emergency
        )
        return flagged or weight >= EMERGENCY_FROM

    def gains(self) -> dict[str, float]:
        """Maps unknown symptoms to the expected gain in the sum of squares from asking.

        The sum of squared probabilities is 1 if one disease is certain. Symptoms that all diseases
        share have no gain. The largest gains come first, then in the table's order.
        """
        now = math.fsum(value * value for value in self.probabilities.values())
        candidates = {
            symptom
            for name, value in self.probabilities.items()
            if value >= 0.02
            for symptom in DISEASES[name].symptoms
        }
        gains = {}
        for symptom in SYMPTOMS:
            if symptom in candidates and symptom not in self.observation.known:
                gains[symptom] = round(self._expected(symptom) - now, 9)
        return dict(sorted(gains.items(), key=lambda item: -item[1]))

    def _expected(self, symptom: str) -> float:
        total = 0.0
        for answer in (True, False):
            weights = []
            for name, value in self.probabilities.items():
                share = DISEASES[name].symptoms.get(symptom, 0.0)
                weights.append(value * (share if answer else 1.0 - share))
            sum_of_weights = math.fsum(weights)
            if sum_of_weights > 0:
                total += math.fsum(weight * weight for weight in weights) / sum_of_weights
        return total


@functools.lru_cache(maxsize=50_000)
def posterior(observation: Observation) -> Belief:
    """Returns the probability of each disease by Bayes' rule, see this module's top.

    Where the information fits no disease, a symptom that a disease does not list gets probability
    .01 under it.
    """
    # In the order of the table, as a set has none and products round by their order.
    told = tuple(
        (name, name in observation.present) for name in SYMPTOMS if name in observation.known
    )
    weights: dict[str, float] = {}
    for surprise in (0.0, _SURPRISE):
        weights = {
            name: disease.weight * _likelihood(disease, observation, told, surprise)
            for name, disease in DISEASES.items()
        }
        if any(weights.values()):
            break
    total = math.fsum(weights.values())
    if total == 0.0:  # A contradiction, such as a pregnant man, is no information.
        weights, total = dict.fromkeys(DISEASES, 1.0), float(len(DISEASES))
    found = {name: weight / total for name, weight in weights.items() if weight > 0}
    return Belief(found, observation)


def near_misses(name: str) -> tuple[str, ...]:
    """Returns the other diseases that share symptoms with one, those that share most first.

    The measure is the sum over symptoms of the smaller of the two probabilities.
    """
    mine = DISEASES[name].symptoms
    shared = {
        other: round(math.fsum(min(p, row.symptoms.get(s, 0.0)) for s, p in mine.items()), 9)
        for other, row in DISEASES.items()
        if other != name
    }
    return tuple(
        other for other, value in sorted(shared.items(), key=lambda item: -item[1]) if value > 0
    )


def best_accuracy(observations: Iterable[Observation]) -> float:
    """Returns the largest share of right diagnoses that these observations allow on average."""
    beliefs = [posterior(observation) for observation in observations]
    best = math.fsum(belief.probabilities[belief.best] for belief in beliefs)
    return best / len(beliefs)


def draw_case(draws: Draws, case_id: str, *, diseases: int | None = None) -> Case:
    """Draws a patient of this world.

    Args:
        draws: the stream of random draws.
        case_id: the name of the case.
        diseases: number of possible diseases, the most common ones; None for all.
    """
    common = sorted(DISEASES, key=lambda name: -DISEASES[name].weight)[:diseases]
    weights = {name: row.weight for name, row in DISEASES.items() if name in common}
    disease = DISEASES[draws.weighted(weights)]
    band = draws.weighted(dict(zip(AGE_BANDS, disease.ages, strict=True)))
    low, high = AGE_BANDS[band]
    age = low + draws.below(high - low + 1)
    sex = SEXES[0] if draws.chance(disease.male) else SEXES[1]
    lasts = draws.weighted(dict(zip(DURATIONS, disease.lasts, strict=True)))
    least, most = _SPANS[lasts]
    since = f"{least + draws.below(most - least + 1)}{_UNITS[lasts]}"
    while True:
        symptoms = tuple(
            name
            for name in SYMPTOMS
            if name in disease.symptoms and draws.chance(disease.symptoms[name])
        )
        if len(symptoms) >= LEAST_SYMPTOMS and any(SYMPTOMS[name].opens for name in symptoms):
            break
    return Case(
        id=case_id,
        disease=disease.name,
        age=age,
        sex=sex,
        since=since,
        lasts=lasts,
        symptoms=symptoms,
        conditions=_draw_conditions(draws, disease, age, sex),
    )


def told_in_order(draws: Draws, case: Case) -> tuple[str, ...]:
    """Returns the case's symptoms in the order in which this patient names them unasked."""
    openers = [name for name in case.symptoms if SYMPTOMS[name].opens]
    first = draws.choice(openers)
    return (first, *draws.shuffled([name for name in case.symptoms if name != first]))


def _draw_conditions(draws: Draws, disease: Disease, age: int, sex: str) -> tuple[str, ...]:
    low, high = PREGNANCY_AGES
    can_be_pregnant = sex == SEXES[1] and low <= age <= high and not disease.no_pregnancy
    if can_be_pregnant and draws.chance(PREGNANT_SHARE):
        return ("怀孕",)
    if draws.chance(CONDITION_SHARE):
        others = [name for name in CONDITIONS if name != "怀孕"]
        # Bleeding and bad organs are rare in the young.
        return (draws.choice(others),) if age >= low else ("青霉素过敏",)
    return ()


def _likelihood(
    disease: Disease,
    observation: Observation,
    told: tuple[tuple[str, bool], ...],
    surprise: float,
) -> float:
    """Returns the probability of the information under a disease, up to a common factor."""
    shares = disease.symptoms
    value = 1.0
    for name, there in told:
        value *= shares.get(name, surprise) if there else 1.0 - shares.get(name, 0.0)
    if value == 0.0:
        return 0.0
    value *= _demography(disease, observation)
    if observation.lasts is not None:
        place = DURATIONS.index(observation.lasts)
        value *= max(disease.lasts[place] / math.fsum(disease.lasts), surprise)
    if value == 0.0:
        return 0.0
    return value * _selection(disease, observation) / _drawn(disease.name)


def _demography(disease: Disease, observation: Observation) -> float:
    pregnant = "怀孕" in observation.conditions
    if pregnant and disease.no_pregnancy:
        return 0.0
    sex = SEXES[1] if pregnant else observation.sex
    value = 1.0 if sex is None else disease.male if sex == SEXES[0] else 1.0 - disease.male
    total = math.fsum(disease.ages)
    if observation.age is not None:
        value *= disease.ages[list(AGE_BANDS).index(_band(observation.age))] / total
    elif pregnant:
        low, high = PREGNANCY_AGES
        value *= math.fsum(
            weight / total * max(0, min(top, high) - max(bottom, low) + 1) / (top - bottom + 1)
            for weight, (bottom, top) in zip(disease.ages, AGE_BANDS.values(), strict=True)
        )
    elif observation.child is not None:
        children = disease.ages[list(AGE_BANDS).index("child")] / total
        value *= children if observation.child else 1.0 - children
    return value


def _band(age: int) -> str:
    """Returns the band of an age; one between two bands counts to the lower."""
    found = "child"
    for name, (low, _) in AGE_BANDS.items():
        if age >= low:
            found = name
    return found


def _selection(disease: Disease, observation: Observation) -> float:
    """Returns the probability of the symptoms named first, over the symptoms not yet known."""
    if observation.opening is None:
        return 1.0
    present, extra = observation.present, len(observation.volunteered)
    openers = sum(SYMPTOMS[name].opens for name in present)
    rest = tuple(
        (SYMPTOMS[name].opens, share)
        for name, share in disease.symptoms.items()
        if name not in observation.known
    )
    return math.fsum(
        chance / max(1, openers + more_openers) / math.comb(count - 1, extra)
        for (more_openers, more), chance in _counts(rest).items()
        if (count := len(present) + more_openers + more) >= LEAST_SYMPTOMS
    )


@functools.cache
def _drawn(disease_name: str) -> float:
    """Returns the probability that the drawn symptoms of a disease make a case."""
    shares = tuple(
        (SYMPTOMS[name].opens, share) for name, share in DISEASES[disease_name].symptoms.items()
    )
    return math.fsum(
        chance
        for (openers, others), chance in _counts(shares).items()
        if openers >= 1 and openers + others >= LEAST_SYMPTOMS
    )


@functools.lru_cache(maxsize=20_000)
def _counts(shares: tuple[tuple[bool, float], ...]) -> dict[tuple[int, int], float]:
    """Returns the distribution of the numbers of symptoms: (opening ones, others) -> chance."""
    found = {(0, 0): 1.0}
    for opens, share in shares:
        grown: dict[tuple[int, int], float] = {}
        for (openers, others), chance in found.items():
            here = (openers + 1, others) if opens else (openers, others + 1)
            grown[here] = grown.get(here, 0.0) + chance * share
            grown[(openers, others)] = grown.get((openers, others), 0.0) + chance * (1.0 - share)
        found = grown
    return found
