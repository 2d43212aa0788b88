"""Exam questions and written cases of this world, with answers that the table gives."""

from collections.abc import Callable, Iterator, Sequence

from huatuo_jax.clinic.care import CONDITIONS, DEPARTMENTS, DRUGS, TESTS
from huatuo_jax.clinic.dialogues import SOURCE
from huatuo_jax.clinic.diseases import DISEASES, Disease
from huatuo_jax.clinic.draws import Draws
from huatuo_jax.clinic.symptoms import SYMPTOMS
from huatuo_jax.clinic.world import (
    Case,
    Observation,
    draw_case,
    near_misses,
    posterior,
    told_in_order,
)
from huatuo_jax.data import records

LETTERS = "ABCDE"
COMMON_FROM = 0.5  # A symptom that so many patients have is common.
CLEAR_FROM = 0.9  # An exam's case leaves no more doubt than this.
_TOLD = 4
_LAST_TRY = 2_000

# A question, its right options, its wrong options, and why.
_Question = tuple[str, Sequence[str], Sequence[str], str]


def exam_questions(count: int, *, seed: int) -> Iterator[records.ExamQuestion]:
    """Questions with five options each, of eight sorts in turn; no two are the same.

    Those with one right answer have it at each letter in turn.

    Args:
        count: how many.
        seed: other questions for another one.

    Raises:
        ValueError: more questions than there are.
    """
    seen: set[tuple[str, ...]] = set()
    for number in range(count):
        for attempt in range(_LAST_TRY):
            draws = Draws("exam", seed, number, attempt)
            # A sort of which all questions are used up makes room for the next one.
            sort = tuple(_SORTS)[(number + attempt // 50) % len(_SORTS)]
            question, right, wrong, why = _SORTS[sort](draws)
            options, answer = _options(draws, right, wrong, LETTERS[number % len(LETTERS)])
            text = (question, *sorted(options.values()))
            if text not in seen:
                break
        else:
            raise ValueError(f"the clinic has no {count} different exam questions")
        seen.add(text)
        yield records.ExamQuestion(
            id=f"clinic_exam_{number + 1:04d}",
            question=question,
            options=options,
            answer=answer,
            source=SOURCE,
            explanation=why,
            extra={"subject": sort},
        )


def written_cases(count: int, *, seed: int, diseases: int | None = None) -> Iterator[records.Case]:
    """Cases as a doctor writes them down, with the diagnosis, the department and the case itself.

    Args:
        count: how many.
        seed: other cases for another one.
        diseases: patients have one of so many, the most common ones; None for all.
    """
    for number in range(1, count + 1):
        case_id = f"clinic_case_{number:04d}"
        draws = Draws("case", seed, number)
        case = draw_case(draws, case_id, diseases=diseases)
        yield records.Case(
            id=case_id,
            medical_case=_written(draws, case),
            doctor_diagnosis=case.disease,
            department=case.truth.department,
            source=SOURCE,
            extra={"case": case.to_json()},
        )


def _written(draws: Draws, case: Case) -> str:
    told = told_in_order(draws, case)
    observation = Observation(
        opening=told[0],
        volunteered=frozenset(told[1:]),
        age=case.age,
        sex=case.sex,
        lasts=case.lasts,
    )
    absent = [
        name for name in posterior(observation).gains() if name not in case.symptoms
    ] or _near_symptoms(case)
    conditions = "".join(f"{CONDITIONS[name][0]}。" for name in case.conditions)
    without = f"无{'、'.join(absent[:2])}。" if absent else ""
    return (
        f"{case.sex}，{case.age}岁，{'、'.join(case.symptoms)}{case.since}。{without}{conditions}"
    )


def _near_symptoms(case: Case) -> list[str]:
    """Symptoms of the nearest other disease that the case has not."""
    other = DISEASES[near_misses(case.disease)[0]].symptoms
    return [name for name in other if name not in case.symptoms]


def _options(
    draws: Draws, right: Sequence[str], wrong: Sequence[str], letter: str
) -> tuple[dict[str, str], str]:
    if len(right) == 1:
        texts = draws.shuffled(wrong)[: len(LETTERS) - 1]
        texts.insert(LETTERS.index(letter), right[0])
    else:
        rest = draws.shuffled(wrong)[: len(LETTERS) - len(right)]
        texts = draws.shuffled([*right, *rest])
    options = dict(zip(LETTERS, texts, strict=True))
    return options, "".join(letter for letter, text in options.items() if text in right)


def _which_disease(draws: Draws) -> _Question:
    while True:
        case = draw_case(draws, "exam")
        told = told_in_order(draws, case)[:_TOLD]
        observation = Observation(
            opening=told[0],
            volunteered=frozenset(told[1:]),
            age=case.age,
            sex=case.sex,
            lasts=case.lasts,
        )
        if posterior(observation).probabilities.get(case.disease, 0.0) >= CLEAR_FROM:
            break
    near = near_misses(case.disease)[:4]
    others = [name for name in DISEASES if name not in near and name != case.disease]
    wrong = [*near, *draws.shuffled(others)][:4]
    question = f"病人{case.sex}，{case.age}岁，{'、'.join(told)}{case.since}，最可能的诊断是什么？"
    return question, [case.disease], wrong, f"这些表现最符合{case.disease}。"


def _which_test(draws: Draws) -> _Question:
    disease = _any(draws)
    wrong = [name for name in TESTS if name not in disease.tests]
    test = disease.tests[0]
    return f"怀疑{disease.name}，首先做哪项检查？", [test], wrong, f"{disease.name}首先做{test}。"


def _which_department(draws: Draws) -> _Question:
    disease = _any(draws)
    # A child may be seen elsewhere, and emergency care turns nobody away.
    wrong = [name for name in DEPARTMENTS if name not in (disease.department, "急诊", "儿科")]
    return (
        f"{disease.name}的病人应该去哪个科？",
        [disease.department],
        wrong,
        f"{disease.name}归{disease.department}。",
    )


def _which_drug(draws: Draws) -> _Question:
    disease = draws.choice([row for row in DISEASES.values() if row.drugs])
    near = {drug for name in near_misses(disease.name)[:3] for drug in DISEASES[name].drugs}
    wrong = [name for name in DRUGS if name not in disease.drugs and name not in near]
    drug = disease.drugs[0]
    return f"{disease.name}常用哪种药？", [drug], wrong, f"{disease.name}常用{drug}。"


def _which_is_forbidden(draws: Draws) -> _Question:
    condition = draws.choice(tuple(CONDITIONS))
    forbidden = [name for name, drug in DRUGS.items() if condition in drug.not_with]
    allowed = [name for name, drug in DRUGS.items() if condition not in drug.not_with]
    drug = draws.choice(forbidden)
    four = draws.shuffled(allowed)[:4]
    return (
        f"病人有{condition}的情况，不能用下面哪种药？",
        [drug],
        four,
        f"{condition}的病人不能用{drug}。",
    )


def _which_is_urgent(draws: Draws) -> _Question:
    flags = [symptom for symptom in SYMPTOMS.values() if symptom.red_flag]
    flag = draws.choice(flags)
    urgent = {name for row in DISEASES.values() if row.emergency for name in row.symptoms}
    calm = [name for name, symptom in SYMPTOMS.items() if symptom.opens and name not in urgent]
    four = draws.shuffled(calm)[:4]
    return (
        "下面哪种情况要马上去急诊？",
        [flag.name],
        four,
        f"{flag.name}是危险的信号，要马上去急诊。",
    )


def _which_tells_apart(draws: Draws) -> _Question:
    while True:
        disease = _any(draws)
        other = DISEASES[draws.choice(near_misses(disease.name)[:3])]
        telling = [
            name
            for name, share in disease.symptoms.items()
            if share >= COMMON_FROM and name not in other.symptoms
        ]
        wrong = [
            name
            for name in SYMPTOMS
            if name in other.symptoms and disease.symptoms.get(name, 0.0) <= other.symptoms[name]
        ]
        if telling and len(wrong) >= 4:
            break
    question = f"哪一项支持{disease.name}，而不支持{other.name}？"
    right = telling[0]
    return question, [right], wrong, f"{right}见于{disease.name}，{other.name}没有。"


def _which_symptoms(draws: Draws) -> _Question:
    disease = _any(draws)
    common = [name for name, share in disease.symptoms.items() if share >= COMMON_FROM][:4]
    wrong = [name for name in SYMPTOMS if name not in disease.symptoms]
    why = f"{disease.name}常见{'、'.join(common)}。"
    return f"{disease.name}常见的症状有哪些？（多选）", common, wrong, why


def _any(draws: Draws) -> Disease:
    return draws.choice(tuple(DISEASES.values()))


_SORTS: dict[str, Callable[[Draws], _Question]] = {
    "诊断": _which_disease,
    "检查": _which_test,
    "科室": _which_department,
    "用药": _which_drug,
    "禁忌": _which_is_forbidden,
    "急诊": _which_is_urgent,
    "鉴别": _which_tells_apart,
    "症状": _which_symptoms,
}
