"""Reads the facts of an answer by its terms, and compares them with the table.

The truth of a question is its `diagnosis`, a name of the table; what the patient has told is read
from the messages. So a record needs nothing else.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from huatuo_jax.clinic.diseases import DISEASES, Disease
from huatuo_jax.clinic.reading import Mention, Sentence, asked, calls_emergency, heard, normal, read
from huatuo_jax.clinic.symptoms import DRUGS, EMERGENCY, forbidden_test
from huatuo_jax.clinic.world import PLAUSIBLE_FROM, Belief, posterior
from huatuo_jax.data.records import Prompt

Diagnosis = Literal["right", "plausible", "wrong", "absent"]

# An answer that names more has no diagnosis, whether or not the right one is among them.
MOST_DISEASES = 3

_ORDERS = ("test", "department", "advice", "drug")
_FRIENDLY = {
    "greets": r"您好|你好",
    "understands": r"理解|感谢|别担心|不要(?:太)?担心|不用(?:太)?担心|别着急|放心|高兴",
    "addresses": r"您",
    "wishes": r"祝|希望您|早日康复|欢迎|尽快好起来",
    "offers": r"建议|请",
}
_LIST_NUMBER = re.compile(r"^\s*(\d{1,2})[.、)]", re.MULTILINE)
_BROKEN = re.compile(r"[\ufffd\x00-\x08\x0b-\x1f\x7f\ue000-\uf8ff]")
_FOREIGN_RUN = re.compile(
    r"[^\u4e00-\u9fff\u3000-\u303f\uff00-\uffef\s\w.,!?;:()%~\-–—…“”‘’·•*#+/、。]{2,}"
)
_DOUBLE_MARK = re.compile(r"[,、;:](?=[,、;:。!?])|[。!?](?=[,、;:])|。。")
_FINISHED = re.compile(r"[。!?~…)”\"】]\s*$")
_REPEAT_ORDER = 4
_DISTINCT_SHARE = 0.6


@dataclass(frozen=True, kw_only=True)
class Item:
    """A test, department, piece of advice or drug that an answer orders.

    Attributes:
        kind: "test", "department", "advice" or "drug".
        name: the table's name.
        right: it is one of those of the true disease.
    """

    kind: str
    name: str
    right: bool


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The findings in one answer.

    Attributes:
        diagnosis: "right": the true disease, alone or clearly first; "plausible": the true one
            among two or three, or one that is probable given the patient's messages; "wrong":
            another one, or more than `MOST_DISEASES`; "absent": none.
        named: the diseases it claims, in order.
        hedged: it claims a disease with doubt.
        many_diagnoses: names more than `MOST_DISEASES`.
        items: its orders.
        contraindicated: drugs and tests it orders that this patient must not have, by the messages.
        should_ask: by the patient's messages, questions come first.
        asks: asks the patient something.
        useful_questions: questions about unknown facts that distinguish diseases, or about
            duration, age or conditions.
        idle_questions: questions about facts that the patient has already told.
        emergency: by the patient's messages, emergency care is needed.
        urgent: sends to emergency care at once.
        false_alarm: sends there without need.
        friendly: those of greets, understands, addresses, wishes, offers that it has.
        structured: is in numbered items, in order.
        broken_characters: holds characters that are not text.
        repetitive: repeats itself.
        unfinished: does not end as a sentence does.
        disordered: numbers or punctuation out of order.
        says_nothing: holds no term, no question, no call for care: nothing this world knows.
        length: letters and characters.
    """

    diagnosis: Diagnosis
    named: tuple[str, ...]
    hedged: bool
    many_diagnoses: bool
    items: tuple[Item, ...]
    contraindicated: tuple[str, ...]
    should_ask: bool
    asks: bool
    useful_questions: int
    idle_questions: int
    emergency: bool
    urgent: bool
    false_alarm: bool
    friendly: tuple[str, ...]
    structured: bool
    broken_characters: bool
    repetitive: bool
    unfinished: bool
    disordered: bool
    says_nothing: bool
    length: int

    @property
    def asks_when_needed(self) -> bool:
        """Returns True if it asks something useful where questions come first."""
        return self.should_ask and self.useful_questions > 0

    @property
    def asks_pointlessly(self) -> bool:
        """Returns True if it only asks in a clear case, or only asks known facts."""
        only_idle = self.asks and self.idle_questions > 0 and self.useful_questions == 0
        return only_idle or (self.asks and not self.should_ask and self.diagnosis == "absent")

    @property
    def red_flag_missed(self) -> bool:
        """Returns True if it does not send to emergency care where that is needed."""
        return self.emergency and not self.urgent

    @property
    def wrong_items(self) -> tuple[Item, ...]:
        """Returns tests, departments and drugs that are not those of the true disease."""
        return tuple(item for item in self.items if not item.right and item.kind != "advice")

    @property
    def coherent(self) -> bool:
        """Returns True if it is a complete text that makes sense."""
        return not (
            self.broken_characters
            or self.repetitive
            or self.unfinished
            or self.disordered
            or self.says_nothing
        )

    @property
    def faults(self) -> tuple[str, ...]:
        """Returns the names of all faults in a fixed order; manner is not a fault."""
        wrong_kinds = {item.kind for item in self.wrong_items}
        concludes = not self.should_ask
        found = {
            "empty": self.length == 0,
            "broken_characters": self.broken_characters,
            "repetitive": self.repetitive,
            "unfinished": self.unfinished,
            "disordered": self.disordered,
            "says_nothing": self.says_nothing,
            "no_diagnosis": concludes and self.diagnosis == "absent",
            "wrong_diagnosis": self.diagnosis == "wrong" and not self.many_diagnoses,
            "many_diagnoses": self.many_diagnoses,
            "wrong_test": "test" in wrong_kinds,
            "wrong_department": "department" in wrong_kinds,
            "wrong_drug": "drug" in wrong_kinds,
            "contraindicated": bool(self.contraindicated),
            "red_flag_missed": self.red_flag_missed,
            "false_alarm": self.false_alarm,
            "not_asked": self.should_ask and self.useful_questions == 0,
            "pointless_question": self.asks_pointlessly,
        }
        return tuple(name for name, there in found.items() if there)


def truth_of(prompt: Prompt) -> Disease:
    """Returns the disease of a prompt.

    Raises:
        ValueError: its diagnosis is not in this world's table.
    """
    for disease in DISEASES.values():
        if prompt.diagnosis in disease.words:
            return disease
    raise ValueError(
        f"prompt {prompt.id!r}: diagnosis is {prompt.diagnosis!r}; the clinic's judge needs one of"
        " the clinic's diseases"
    )


def find(prompt: Prompt, answer: str, *, with_reference: bool = True) -> Findings:
    """Reads the facts of an answer to a prompt.

    Args:
        prompt: of this world; its messages and its diagnosis count.
        answer: any text.
        with_reference: compare with the true disease; if False, with the most probable one given
            the patient's messages, as by someone who knows medicine but not this patient.

    Raises:
        ValueError: the prompt's diagnosis is not in this world's table.
    """
    observation = heard(prompt.messages)
    belief = posterior(observation)
    disease = truth_of(prompt) if with_reference else DISEASES[belief.best]
    parts = read(answer)
    claims = _claims(parts)
    named = tuple(dict.fromkeys(mention.name for mention in claims))
    needs_care = belief.emergency
    items = _items(parts, disease, emergency=needs_care or disease.emergency)
    urgent = calls_emergency(answer)
    useful, idle, asks = _questions(answer, belief)
    age = observation.age_for_drugs
    known = any(sentence.mentions for sentence in parts)
    text = normal(answer)
    return Findings(
        diagnosis=_diagnosis(claims, named, disease.name, belief),
        named=named,
        hedged=any(mention.stance == "hedged" for mention in claims),
        many_diagnoses=len(named) > MOST_DISEASES,
        items=items,
        contraindicated=tuple(
            item.name
            for item in items
            if (item.kind == "drug" and DRUGS[item.name].forbidden(observation.conditions, age))
            or (item.kind == "test" and forbidden_test(item.name, observation.conditions))
        ),
        should_ask=belief.should_ask,
        asks=asks,
        useful_questions=useful,
        idle_questions=idle,
        emergency=needs_care,
        urgent=urgent,
        false_alarm=urgent and not needs_care and not disease.emergency,
        friendly=tuple(name for name, cue in _FRIENDLY.items() if re.search(cue, answer)),
        structured=len(_LIST_NUMBER.findall(text)) >= 2,
        broken_characters=bool(_BROKEN.search(answer) or _FOREIGN_RUN.search(text)),
        repetitive=_is_repetitive(text, parts),
        unfinished=bool(text.strip()) and not _FINISHED.search(text),
        disordered=_is_disordered(text),
        says_nothing=not known and not asks and not urgent,
        length=sum(map(str.isalnum, text)),
    )


def _claims(parts: Sequence[Sentence]) -> tuple[Mention, ...]:
    return tuple(
        mention
        for sentence in parts
        for mention in sentence.mentions
        if mention.kind == "disease" and mention.stance in ("claimed", "hedged")
    )


def _diagnosis(
    claims: Sequence[Mention], named: Sequence[str], truth: str, belief: Belief
) -> Diagnosis:
    if not named:
        return "absent"
    if len(named) > MOST_DISEASES:
        return "wrong"
    others = {mention.name for mention in claims if mention.secondary}
    first_and_alone = named[0] == truth and set(named[1:]) <= others and truth not in others
    if first_and_alone:
        return "right"
    if truth in named:
        return "plausible"
    probable = any(belief.probabilities.get(name, 0.0) >= PLAUSIBLE_FROM for name in named)
    return "plausible" if probable else "wrong"


def _items(parts: Sequence[Sentence], disease: Disease, *, emergency: bool) -> tuple[Item, ...]:
    right = {
        "test": set(disease.tests),
        "department": {disease.department} | ({EMERGENCY} if emergency else set()),
        "advice": set(disease.advice),
        "drug": set(disease.drugs),
    }
    found = {
        (mention.kind, mention.name): None
        for sentence in parts
        for mention in sentence.mentions
        if mention.kind in _ORDERS
        and mention.stance == "claimed"
        and not _is_call(mention, sentence)
    }
    return tuple(Item(kind=kind, name=name, right=name in right[kind]) for kind, name in found)


def _is_call(mention: Mention, sentence: Sentence) -> bool:
    """Returns True if 急诊 is a call for emergency care rather than a place for a test."""
    if mention.name != EMERGENCY or mention.kind != "department":
        return False
    others = [other for other in sentence.mentions if other.kind == "test"]
    return not others


def _questions(answer: str, belief: Belief) -> tuple[int, int, bool]:
    """Counts useful and idle questions; the last value is True if there is any question."""
    questions = asked(answer)
    observation = belief.observation
    gains = belief.gains()
    useful = sum(gains.get(name, 0.0) > 0 for name in questions.symptoms)
    idle = sum(name in observation.known for name in questions.symptoms)
    told = {
        "duration": observation.lasts is not None,
        "age": observation.age is not None,
        "sex": observation.sex is not None,
        "conditions": bool(observation.conditions),
        "more": False,
    }
    useful += sum(not told[topic] for topic in questions.topics)
    idle += sum(told[topic] for topic in questions.topics if topic != "conditions")
    return useful, idle, questions.anything


def _is_repetitive(text: str, parts: Sequence[Sentence]) -> bool:
    said = Counter(sentence.text.rstrip("。!?;…~ \n") for sentence in parts)
    if any(count > 1 and len(sentence) >= 4 for sentence, count in said.items()):
        return True
    plain = "".join(filter(str.isalnum, text))
    grams = {
        plain[start : start + _REPEAT_ORDER] for start in range(len(plain) - _REPEAT_ORDER + 1)
    }
    total = len(plain) - _REPEAT_ORDER + 1
    return total > _REPEAT_ORDER and len(grams) < _DISTINCT_SHARE * total


def _is_disordered(text: str) -> bool:
    numbers = [int(number) for number in _LIST_NUMBER.findall(text)]
    return numbers != list(range(1, len(numbers) + 1)) or _DOUBLE_MARK.search(text) is not None
