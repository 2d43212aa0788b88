"""Answers with known faults, and pairs of answers that differ in one respect only.

They test a reader of answers, a judge or a reward model against the truth: a planted fault must be
found, and no other; of a pair that differs in truth alone the true one should get the higher
reward, whatever the manner.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from huatuo_jax.clinic.dialogues import (
    SOURCE,
    allowed_drugs,
    echo,
    first_test,
    fitting_advice,
    prompts,
)
from huatuo_jax.clinic.diseases import DISEASES
from huatuo_jax.clinic.findings import truth_of
from huatuo_jax.clinic.reading import heard
from huatuo_jax.clinic.symptoms import ADVICE, DEPARTMENTS, DRUGS, EMERGENCY, TESTS, forbidden_test
from huatuo_jax.clinic.world import (
    LEAST_GAIN,
    PLAUSIBLE_FROM,
    Belief,
    Draws,
    near_misses,
    posterior,
)
from huatuo_jax.clinic.writing import Writer
from huatuo_jax.data.records import Comparison, Prompt, answer

Manner = Literal["real", "distilled"]
Difference = Literal["truth", "manner", "length"]
DIFFERENCES: tuple[Difference, ...] = get_args(Difference)

FAULTS = (
    "none",
    "empty",
    "broken_characters",
    "repetitive",
    "unfinished",
    "disordered",
    "says_nothing",
    "no_diagnosis",
    "wrong_diagnosis",
    "many_diagnoses",
    "wrong_test",
    "wrong_department",
    "wrong_drug",
    "contraindicated",
    "red_flag_missed",
    "false_alarm",
    "not_asked",
    "pointless_question",
)
_BROKEN = ("\ufffd", "\x00", "\ue000")
_TRY_OTHERS = 400
_Pair = tuple[str, str] | None


@dataclass(frozen=True, kw_only=True)
class PlantedAnswer:
    """An answer with known faults.

    Attributes:
        prompt: the prompt it answers.
        text: the answer.
        faults: names as in `Findings.faults`, unordered.
        manner: the manner it is written in.
    """

    prompt: Prompt
    text: str
    faults: frozenset[str]
    manner: Manner


def planted_answers(count: int, *, seed: int, held_out: bool = False) -> Iterator[PlantedAnswer]:
    """Yields answers with the faults of `FAULTS` in turn, in both manners.

    A fault that no answer to the current prompt can have (a contraindicated drug for a patient who
    may have all) goes to the next prompt that allows it.

    Args:
        count: number of answers.
        seed: another seed gives other answers.
        held_out: to held-out prompts, in held-out wording.
    """
    pool = list(prompts(_TRY_OTHERS, seed=seed, held_out=held_out))
    for number in range(count):
        fault = FAULTS[number % len(FAULTS)]
        draws = Draws("planted", seed, held_out, number)
        start = draws.below(len(pool))
        manner = _any_manner(draws)
        for prompt in pool[start:] + pool[:start]:
            found = _plant(_Answer(prompt, Writer(draws, held_out=held_out), manner), fault)
            if found is not None:
                yield found
                break
        else:
            raise ValueError(f"no prompt of the clinic with seed {seed} takes the fault {fault!r}")


def pairs_that_differ(
    difference: Difference,
    count: int,
    *,
    seed: int,
    held_out: bool = False,
    diseases: int | None = None,
) -> Iterator[Comparison]:
    """Yields pairs of answers that differ in one respect only.

    In truth: the same text but for the disease named, a near miss in place of the right one. In
    manner: the same disease and orders, `chosen` in the distilled manner. In length: `chosen` has
    two more pieces of advice than are useful; an exact judge takes them for equal, so `p_chosen` is
    a half.

    Args:
        difference: the respect in which they differ.
        count: number of pairs.
        seed: another seed gives other pairs.
        held_out: to held-out prompts, in held-out wording.
        diseases: number of diseases that patients have, the most common ones; None for all.

    Raises:
        ValueError: an unknown difference, or too few prompts.
    """
    if difference not in DIFFERENCES:
        raise ValueError(f"difference is {difference!r}; it should be in {', '.join(DIFFERENCES)}")
    made = 0
    pool = prompts(2 * count + 20, seed=seed, held_out=held_out, diseases=diseases)
    for prompt in pool:
        draws = Draws("pair", difference, seed, held_out, prompt.id)
        pair = _PAIRS[difference](prompt, draws, held_out)
        if pair is None or made == count:
            continue
        made += 1
        yield Comparison(
            id=f"{prompt.id}:{difference}",
            messages=prompt.messages,
            chosen=answer(pair[0]),
            rejected=answer(pair[1]),
            source=SOURCE,
            p_chosen=0.5 if difference == "length" else 1.0,
            extra={"differs_in": difference, "diagnosis": prompt.diagnosis},
        )
    if made < count:
        raise ValueError(f"{count} pairs that differ in {difference} are too many for the clinic")


def _differs_in_truth(prompt: Prompt, draws: Draws, held_out: bool) -> _Pair:
    written = _Answer(prompt, Writer(draws, held_out=held_out), _any_manner(draws))
    if not written.concludes:
        return None
    true_text = written.text()
    truth = written.disease
    wrong = DISEASES[draws.choice(near_misses(truth.name)[:3])]
    # The diagnosis comes before a test that has the same word in its name.
    word = next(word for word in sorted(truth.words, key=len, reverse=True) if word in true_text)
    return true_text, true_text.replace(word, wrong.name, 1)


def _differs_in_manner(prompt: Prompt, draws: Draws, held_out: bool) -> _Pair:
    written = _Answer(prompt, Writer(draws, held_out=held_out), "distilled")
    written.remarks = False
    if not written.concludes:
        return None
    distilled = written.text()
    written.manner = "real"
    return distilled, written.text()


def _differs_in_length(prompt: Prompt, draws: Draws, held_out: bool) -> _Pair:
    writer = Writer(draws, held_out=held_out)
    written = _Answer(prompt, writer, _any_manner(draws))
    more = [name for name in written.disease.advice if name not in written.advice]
    others = [name for name in ADVICE if name not in written.disease.advice]
    if not written.concludes:
        return None
    short = written.text()
    two = [*more, *draws.shuffled(others)][:2]
    return short + writer.say("advise", *map(writer.advice, two)), short


_PAIRS: dict[Difference, Callable[[Prompt, Draws, bool], _Pair]] = {
    "truth": _differs_in_truth,
    "manner": _differs_in_manner,
    "length": _differs_in_length,
}


class _Answer:
    """The parts of an answer before they become a text."""

    def __init__(self, prompt: Prompt, writer: Writer, manner: Manner) -> None:
        self.prompt, self.writer, self.manner = prompt, writer, manner
        self.observation = heard(prompt.messages)
        self.belief: Belief = posterior(self.observation)
        self.disease = truth_of(prompt)
        self.named = [self.disease.name]
        self.test = first_test(self.disease, self.observation)
        self.department = self.disease.department
        self.advice = writer.draws.shuffled(fitting_advice(self.disease, self.observation))[:2]
        drugs = allowed_drugs(self.disease, self.observation)
        self.drug = writer.draws.choice(drugs) if drugs else None
        self.urgent = self.belief.emergency
        self.asks = [name for name, gain in self.belief.gains().items() if gain >= LEAST_GAIN][:2]
        self.concludes = not self.belief.should_ask
        self.remarks = True

    def text(self) -> str:
        """Writes the answer in its manner, with side remarks that are not faults."""
        return self._real() if self.manner == "real" else self._distilled()

    def _questions(self) -> str:
        return "".join(self.writer.say("ask", self.writer.symptom(name)) for name in self.asks)

    def _claims(self, first: str, further: str) -> str:
        """Writes a sentence for each disease; the first one repeats what the patient told."""
        writer = self.writer
        told = echo(writer, self.observation)
        return "".join(
            writer.say(further, writer.disease(name))
            if place
            else writer.say(first, told, writer.disease(name))
            for place, name in enumerate(self.named)
        )

    def _remark(self) -> str:
        """Writes a sentence about another disease or drug that claims and orders nothing."""
        if not self.remarks:
            return ""
        writer = self.writer
        others = [name for name in DISEASES if name not in self.named]
        other = writer.disease(writer.draws.choice(others))
        return writer.draws.choice(
            (
                "",
                f"不像{other}。",
                f"可以排除{other}。",
                f"{other}的可能性不大。",
                f"要排除{other}。",
                f"如果加重，可能是{other}。",
                f"不用吃{writer.drug(writer.draws.choice(tuple(DRUGS)))}。",
                f"不用做{writer.test(writer.draws.choice(tuple(TESTS)))}。",
            )
        )

    def _real(self) -> str:
        writer = self.writer
        if not self.concludes:
            return self._questions()
        parts = [self._claims("conclude_from", "conclude"), self._remark()]
        parts.append(
            writer.say("visit", writer.department(self.department), writer.test(self.test))
        )
        if self.drug:
            parts.append(writer.say("prescribe", writer.drug(self.drug)))
        parts.append(writer.say("advise", *map(writer.advice, self.advice)))
        if self.urgent:
            parts.append("马上去急诊。")
        return "".join(parts)

    def _distilled(self) -> str:
        writer = self.writer
        if not self.concludes:
            return writer.say("greet") + self._questions() + writer.say("wish")
        opening = writer.say("greet") + self._claims("guess_from", "guess")
        visit = writer.say(
            "guided_visit", writer.department(self.department), writer.test(self.test)
        )
        items = [visit, writer.say("guided_advice", *map(writer.advice, self.advice))]
        if self.drug:
            items.append(writer.say("guided_drug", writer.drug(self.drug)))
        closing = writer.say("guided_urgent" if self.urgent else "wish")
        numbered = (f"{place}. {item}" for place, item in enumerate(items, start=1))
        return "\n".join((opening + self._remark(), *numbered, closing))


def _no_diagnosis(written: _Answer) -> set[str] | None:
    written.named = []
    return set() if written.concludes else None


def _wrong_diagnosis(written: _Answer) -> set[str] | None:
    probable = written.belief.probabilities
    wrong = [name for name in DISEASES if probable.get(name, 0.0) < PLAUSIBLE_FROM]
    wrong = [name for name in wrong if name != written.disease.name]
    written.named = [written.writer.draws.choice(wrong)]
    return set() if written.concludes else None


def _many_diagnoses(written: _Answer) -> set[str] | None:
    others = [name for name in DISEASES if name != written.disease.name]
    written.named += written.writer.draws.shuffled(others)[:4]
    return set() if written.concludes else None


def _wrong_test(written: _Answer) -> set[str] | None:
    conditions = written.observation.conditions
    wrong = [
        name
        for name in TESTS
        if name not in written.disease.tests and not forbidden_test(name, conditions)
    ]
    written.test = written.writer.draws.choice(wrong)
    return set() if written.concludes else None


def _wrong_department(written: _Answer) -> set[str] | None:
    right = (written.disease.department, EMERGENCY)
    wrong = [name for name in DEPARTMENTS if name not in right]
    written.department = written.writer.draws.choice(wrong)
    return set() if written.concludes else None


def _wrong_drug(written: _Answer) -> set[str] | None:
    known = written.observation
    wrong = [
        name
        for name, drug in DRUGS.items()
        if name not in written.disease.drugs
        and not drug.forbidden(known.conditions, known.age_for_drugs)
    ]
    written.drug = written.writer.draws.choice(wrong)
    return set() if written.concludes else None


def _contraindicated(written: _Answer) -> set[str] | None:
    allowed = allowed_drugs(written.disease, written.observation)
    banned = [name for name in written.disease.drugs if name not in allowed]
    if not banned or not written.concludes:
        return None
    written.drug = written.writer.draws.choice(banned)
    return set()


def _red_flag_missed(written: _Answer) -> set[str] | None:
    if not written.belief.emergency or written.department == EMERGENCY:
        return None
    written.urgent = False
    return set()


def _false_alarm(written: _Answer) -> set[str] | None:
    if written.belief.emergency or written.disease.emergency or not written.concludes:
        return None
    written.urgent = True
    return set()


def _not_asked(written: _Answer) -> set[str] | None:
    written.concludes = True
    return set() if written.belief.should_ask else None


def _pointless_question(written: _Answer) -> set[str] | None:
    """Asks only about facts that the patient has already told."""
    if written.belief.should_ask or written.belief.emergency:
        return None
    written.asks = sorted(written.observation.known)[:2]
    written.concludes = False
    return {"no_diagnosis"}


_ON_PARTS: dict[str, Callable[[_Answer], set[str] | None]] = {
    "no_diagnosis": _no_diagnosis,
    "wrong_diagnosis": _wrong_diagnosis,
    "many_diagnoses": _many_diagnoses,
    "wrong_test": _wrong_test,
    "wrong_department": _wrong_department,
    "wrong_drug": _wrong_drug,
    "contraindicated": _contraindicated,
    "red_flag_missed": _red_flag_missed,
    "false_alarm": _false_alarm,
    "not_asked": _not_asked,
    "pointless_question": _pointless_question,
}


def _empty(written: _Answer, text: str) -> tuple[str, set[str]]:
    return "", {"says_nothing"} | _nothing_said(written)


def _says_nothing(written: _Answer, text: str) -> tuple[str, set[str]]:
    return written.writer.say("greet") + written.writer.say("wish"), _nothing_said(written)


def _broken_characters(written: _Answer, text: str) -> tuple[str, set[str]]:
    broken = written.writer.draws.choice(_BROKEN)
    return text[:-1] + broken + text[-1:], set()


def _repetitive(written: _Answer, text: str) -> tuple[str, set[str]]:
    return text + text.split("\n")[0], set()


def _unfinished(written: _Answer, text: str) -> tuple[str, set[str]] | None:
    return text.rstrip("。！？") + "，", set()


def _disordered(written: _Answer, text: str) -> tuple[str, set[str]] | None:
    if "\n2. " in text:
        return text.replace("\n2. ", "\n1. "), set()
    return text.replace("，", "，，", 1) if "，" in text else text[:-1] + "，。", set()


_ON_TEXT: dict[str, Callable[[_Answer, str], tuple[str, set[str]] | None]] = {
    "empty": _empty,
    "says_nothing": _says_nothing,
    "broken_characters": _broken_characters,
    "repetitive": _repetitive,
    "unfinished": _unfinished,
    "disordered": _disordered,
}


def _any_manner(draws: Draws) -> Manner:
    return "real" if draws.chance(0.5) else "distilled"


def _plant(written: _Answer, fault: str) -> PlantedAnswer | None:
    """Makes the answer with this fault, or None where it is impossible."""
    before, after = _ON_PARTS.get(fault), _ON_TEXT.get(fault)
    faults = {fault} - {"none"}
    if before is not None:
        more = before(written)
        if more is None:
            return None
        faults |= more
    text = written.text()
    if after is not None:
        changed = after(written, text)
        if changed is None:
            return None
        text, more = changed
        faults |= more
    return PlantedAnswer(
        prompt=written.prompt, text=text, faults=frozenset(faults), manner=written.manner
    )


def _nothing_said(written: _Answer) -> set[str]:
    """Returns the faults of an answer that says nothing."""
    missing = {"not_asked" if written.belief.should_ask else "no_diagnosis"}
    return missing | ({"red_flag_missed"} if written.belief.emergency else set())
