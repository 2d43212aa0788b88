"""Writes all files of the clinic that the recipe needs, the same bytes for one seed.

They include exam questions and written cases, with answers from the tables.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

from huatuo_jax.clinic.dialogues import SOURCE, counts_of_kinds, dialogues, prompts
from huatuo_jax.clinic.diseases import DISEASES, Disease
from huatuo_jax.clinic.planted import DIFFERENCES, Difference, pairs_that_differ
from huatuo_jax.clinic.symptoms import CONDITIONS, DEPARTMENTS, DRUGS, SYMPTOMS, TESTS
from huatuo_jax.clinic.world import (
    Case,
    Draws,
    Observation,
    draw_case,
    near_misses,
    posterior,
    told_in_order,
)
from huatuo_jax.core.files import as_path, hash_of_files, make_folder, write_file
from huatuo_jax.data import records

LETTERS = "ABCDE"
COMMON_FROM = 0.5  # The least share of patients with a common symptom.
CLEAR_FROM = 0.9  # The least probability of the diagnosis in an exam's case.
_TOLD = 4
_LAST_TRY = 2_000
# A question, its right options, its wrong options, and the explanation.
_Question = tuple[str, Sequence[str], Sequence[str], str]
HELD_OUT = "held_out_"
PROMPTS, CASES, EXAMS = "prompts.jsonl", "cases.jsonl", "exams.jsonl"
TOKENIZER = pathlib.Path(__file__).resolve().parent / "tokenizer"
"""The folder of the tokenizer that ships with the clinic, see `build_tokenizer`."""

SETTINGS_FILE = "clinic.json"
"""The file of seed, sizes, a hash of the code that wrote the files, and one of each file."""


def exam_questions(count: int, *, seed: int) -> Iterator[records.ExamQuestion]:
    """Yields different questions with five options each, of eight sorts in turn.

    Those with one right answer have it at each letter in turn.

    Args:
        count: number of questions.
        seed: another seed gives other questions.

    Raises:
        ValueError: there are fewer different questions.
    """
    seen: set[tuple[str, ...]] = set()
    for number in range(count):
        for attempt in range(_LAST_TRY):
            draws = Draws("exam", seed, number, attempt)
            # A sort without unused questions gives way to the next one.
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


def written_cases(
    count: int, *, seed: int, diseases: int | None = None, first: int = 1
) -> Iterator[records.Case]:
    """Yields cases as a doctor writes them down, with diagnosis, department and the case itself.

    Args:
        count: number of cases.
        seed: another seed gives other cases.
        diseases: number of diseases that patients have, the most common ones; None for all.
        first: number of the first one; a case follows from its number and the seed alone.
    """
    for number in range(first, first + count):
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


@dataclass(frozen=True, kw_only=True)
class ClinicSizes:
    """Rows of each file.

    Attributes:
        dialogues: to train on, of all four kinds together.
        held_out_dialogues: of all four kinds together.
        prompts: for reinforcement learning.
        held_out_prompts: to evaluate on.
        cases: written cases, each of them a simulated patient.
        exams: exam questions.
        diseases: number of diseases that patients have, the most common of the table. Doctors
            consider the whole table, and exams ask about it.
        pairs: held-out pairs of answers for each difference: in truth, in manner, in length.
    """

    dialogues: int = 1_800
    held_out_dialogues: int = 200
    prompts: int = 400
    held_out_prompts: int = 150
    cases: int = 200
    exams: int = 200
    diseases: int = len(DISEASES)
    pairs: int = 100

    def __post_init__(self) -> None:
        """Validates that no size is negative and that the table has these diseases."""
        if not 1 <= self.diseases <= len(DISEASES):
            raise ValueError(f"diseases is {self.diseases}; it should be 1 to {len(DISEASES)}")
        for field in fields(self):
            if getattr(self, field.name) < 0:
                raise ValueError(
                    f"{field.name} is {getattr(self, field.name)}; it should be 0 or more"
                )


@dataclass(frozen=True, kw_only=True)
class ClinicConfig:
    """A clinic.

    Attributes:
        seed: another seed gives another clinic.
        sizes: rows of each file.
    """

    seed: int = 0
    sizes: ClinicSizes = ClinicSizes()


def write_clinic(
    folder: str | os.PathLike[str], *, seed: int = 0, sizes: ClinicSizes | None = None
) -> dict[str, pathlib.Path]:
    """Writes the files of a clinic, JSON Lines in UTF-8, and last `clinic.json`.

    Args:
        folder: created if missing.
        seed: another seed gives another clinic; the same one gives the same bytes everywhere.
        sizes: rows of each file.

    Returns:
        Name -> path: `KIND.jsonl` and `held_out_KIND.jsonl` for each of the four kinds,
        `prompts.jsonl`, `held_out_prompts.jsonl`, `cases.jsonl`, `exams.jsonl`, and
        `pairs_DIFFERENCE.jsonl` for each of `planted.DIFFERENCES`.

    Raises:
        ValueError: a clinic has fewer different rows.
        OSError: a file cannot be written.
    """
    target, cfg = as_path(folder), ClinicConfig(seed=seed, sizes=sizes or ClinicSizes())
    contents = _contents(cfg)
    _write(target, cfg, contents)
    return {name: target / name for name in contents}


def prepare_clinic(folder: str | os.PathLike[str], cfg: ClinicConfig, *, in_use: bool) -> None:
    """Writes a clinic, unless the folder already holds the same files.

    Args:
        folder: of the clinic.
        cfg: the clinic.
        in_use: something was made from the existing files, which therefore must not be replaced.

    Raises:
        ValueError: other files exist and are in use, or a clinic has fewer rows.
        OSError: a file cannot be read or written.
    """
    target = as_path(folder)
    found = _settings_there(target)
    wanted = _settings(cfg)
    if found is not None and {name: found[name] for name in wanted} == wanted:
        if all(_hash_there(target / name) == digest for name, digest in found["files"].items()):
            return
    contents = _contents(cfg)
    hashes = {name: _hash(content) for name, content in contents.items()}
    if in_use and any(_hash_there(target / name) != hashes[name] for name in contents):
        raise ValueError(
            f"{target}: the models here were trained on another clinic than seed={cfg.seed} of "
            f"these sizes and this version writes{_differences(found, wanted)}; undo the change, "
            "or choose another workdir"
        )
    _write(target, cfg, contents)


def pairs_file(difference: Difference) -> str:
    """Returns the name of the file of pairs with this difference."""
    return f"pairs_{difference}.jsonl"


def _which_disease(draws: Draws) -> _Question:
    while True:
        case = draw_case(draws, "exam")
        told = told_in_order(draws, case)[:_TOLD]
        observation = _observation(case, told)
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


class _Record(Protocol):
    def to_json(self) -> dict[str, Any]: ...


def clinic_records(*, seed: int, sizes: ClinicSizes) -> Mapping[str, Iterable[_Record]]:
    """Returns the records of each file by its name, made when iterated; see `write_clinic`."""
    found: dict[str, Iterable[_Record]] = {}
    for held_out, total in ((False, sizes.dialogues), (True, sizes.held_out_dialogues)):
        prefix = HELD_OUT if held_out else ""
        for kind, count in counts_of_kinds(total).items():
            name = f"{prefix}{kind}.jsonl"
            found[name] = dialogues(
                kind, count, seed=seed, held_out=held_out, diseases=sizes.diseases
            )
    found[PROMPTS] = prompts(sizes.prompts, seed=seed, diseases=sizes.diseases)
    found[HELD_OUT + PROMPTS] = prompts(
        sizes.held_out_prompts, seed=seed, held_out=True, diseases=sizes.diseases
    )
    found[CASES] = written_cases(sizes.cases, seed=seed, diseases=sizes.diseases)
    found[EXAMS] = exam_questions(sizes.exams, seed=seed)
    for difference in DIFFERENCES:
        found[pairs_file(difference)] = pairs_that_differ(
            difference, sizes.pairs, seed=seed, held_out=True, diseases=sizes.diseases
        )
    return found


def _written(draws: Draws, case: Case) -> str:
    told = told_in_order(draws, case)
    observation = _observation(case, told)
    absent = [
        name for name in posterior(observation).gains() if name not in case.symptoms
    ] or _near_symptoms(case)
    conditions = "".join(f"{CONDITIONS[name][0]}。" for name in case.conditions)
    without = f"无{'、'.join(absent[:2])}。" if absent else ""
    return (
        f"{case.sex}，{case.age}岁，{'、'.join(case.symptoms)}{case.since}。{without}{conditions}"
    )


def _observation(case: Case, told: Sequence[str]) -> Observation:
    """Returns the information from a patient who names these symptoms in order."""
    return Observation(
        opening=told[0],
        volunteered=frozenset(told[1:]),
        age=case.age,
        sex=case.sex,
        lasts=case.lasts,
    )


def _near_symptoms(case: Case) -> list[str]:
    """Returns symptoms of the nearest other disease that the case lacks."""
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


def _any(draws: Draws) -> Disease:
    return draws.choice(tuple(DISEASES.values()))


def _contents(cfg: ClinicConfig) -> dict[str, bytes]:
    return {
        name: "".join(f"{json.dumps(row.to_json(), ensure_ascii=False)}\n" for row in rows).encode()
        for name, rows in clinic_records(seed=cfg.seed, sizes=cfg.sizes).items()
    }


def _write(target: pathlib.Path, cfg: ClinicConfig, contents: Mapping[str, bytes]) -> None:
    settings = {
        **_settings(cfg),
        "files": {name: _hash(content) for name, content in contents.items()},
    }
    make_folder(target)
    # The settings mark the files as complete: removed first, written last.
    (target / SETTINGS_FILE).unlink(missing_ok=True)
    for name, content in contents.items():
        write_file(target / name, content)
    text = json.dumps(settings, ensure_ascii=False, indent=2)
    write_file(target / SETTINGS_FILE, f"{text}\n")


def _settings(cfg: ClinicConfig) -> dict[str, Any]:
    """Returns everything that decides the bytes."""
    code = sorted(pathlib.Path(__file__).parent.glob("*.py"))
    return {**asdict(cfg), "code": hash_of_files(code)}


def _settings_there(folder: pathlib.Path) -> dict[str, Any] | None:
    """Returns the settings of the files in a folder, or None without valid ones."""
    path = folder / SETTINGS_FILE
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    whole = isinstance(found, dict) and {"seed", "sizes", "code", "files"} <= set(found)
    return found if whole and isinstance(found["files"], dict) else None


def _differences(found: Mapping[str, Any] | None, wanted: Mapping[str, Any]) -> str:
    """Describes the settings that have changed."""
    if found is None:
        return ""
    names = [name for name in ("seed", "sizes") if found[name] != wanted[name]]
    told = [f"{name}: {found[name]} before, {wanted[name]} now" for name in names]
    return f" ({'; '.join(told)})" if told else ""


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _hash_there(path: pathlib.Path) -> str | None:
    return _hash(path.read_bytes()) if path.is_file() else None
