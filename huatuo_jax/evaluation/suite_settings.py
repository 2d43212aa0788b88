"""Settings of an evaluation by suites: the files of the sets, and how they are answered and judged.

`check_settings` refuses a setting that decides nothing, such as the file of a suite that is not
run, so that nobody waits for a figure that never comes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields

from huatuo_jax.core.config import Text, operational
from huatuo_jax.evaluation.clinical import History
from huatuo_jax.evaluation.comparing_suites import PatientName
from huatuo_jax.evaluation.consultations import Ending
from huatuo_jax.evaluation.exam_files import COMPLETIONS, EXAMS, ExampleFiles
from huatuo_jax.evaluation.healthbench import Calls, Subset
from huatuo_jax.evaluation.lexical import Average, Tokenizer
from huatuo_jax.evaluation.suites import By
from huatuo_jax.judge.config import JudgeConfig


@dataclass(frozen=True, kw_only=True)
class Files:
    """The sets, each in the form in which it is published.

    Attributes:
        cmedqa2: folder with question.csv, answer.csv and test_candidates.txt (lexical).
        webmedqa: medQA.test.txt (lexical).
        huatuo26m: file of Huatuo-26M, or its data set on the Hub (lexical).
        cmb: CMB's questions (exams).
        cmb_answers: CMB's answers, where the questions come without.
        cmexam: CMExam's CSV (exams).
        medqa_us: JSON lines of MedQA, United States (exams).
        medqa_mainland: of MedQA, mainland China (exams).
        medqa_taiwan: of MedQA, Taiwan (exams).
        medmcqa: JSON lines of MedMCQA (exams).
        pubmedqa: ori_pqal.json (exams).
        pubmedqa_test: test_ground_truth.json, whose questions are then the set.
        cmmlu: folder with test/ and dev/ (exams, medical subjects).
        ceval: folder with val/ and dev/ (exams, medical subjects).
        mmlu: folder with test/ and dev/ (exams, medical subjects).
        apollo: files of Apollo's form, each a set of its own (exams).
        kuake_qic: HuatuoGPT's questions of KUAKE-QIC (single_turn).
        med_dialog: HuatuoGPT's cases of Med-dialog (multi_turn with a model as the patient).
        cmb_clin: CMB-Clin's cases (clinical).
        healthbench: JSON lines of HealthBench (healthbench).
    """

    cmedqa2: str | None = None
    webmedqa: str | None = None
    huatuo26m: str | None = None
    cmb: str | None = None
    cmb_answers: str | None = None
    cmexam: str | None = None
    medqa_us: str | None = None
    medqa_mainland: str | None = None
    medqa_taiwan: str | None = None
    medmcqa: str | None = None
    pubmedqa: str | None = None
    pubmedqa_test: str | None = None
    cmmlu: str | None = None
    ceval: str | None = None
    mmlu: str | None = None
    apollo: tuple[str, ...] = ()
    kuake_qic: str | None = None
    med_dialog: str | None = None
    cmb_clin: str | None = None
    healthbench: str | None = None


SUITE_FILES: Mapping[str, tuple[str, ...]] = {
    "lexical": ("cmedqa2", "webmedqa", "huatuo26m"),
    "exams": (*EXAMS, "cmmlu", "ceval", "mmlu", "apollo", *COMPLETIONS.values()),
    "single_turn": ("kuake_qic",),
    "multi_turn": ("med_dialog",),
    "clinical": ("cmb_clin",),
    "healthbench": ("healthbench",),
    "clinic": (),
}
"""The suites, and the fields of `Files` that each reads."""

_SUITE_FIELDS: Mapping[str, tuple[str, ...]] = {
    "tokenizer": ("lexical",),
    "nfkc": ("lexical",),
    "average": ("lexical",),
    "smoothing": ("lexical",),
    "conventions": ("lexical",),
    "exam_by": ("exams",),
    "exam_form": ("exams",),
    "num_examples": ("exams",),
    "examples": ("exams",),
    "human": ("single_turn",),
    "ratings": ("single_turn",),
    "patient": ("multi_turn",),
    "ending": ("multi_turn",),
    "max_exchanges": ("multi_turn",),
    "history": ("clinical",),
    "calls": ("healthbench",),
    "subset": ("healthbench",),
    "clinic_cases": ("clinic", "multi_turn"),
    "judge": ("single_turn", "multi_turn", "clinical", "healthbench"),
    "second_judge": ("single_turn", "multi_turn"),
}
"""Settings that only some suites take."""


@dataclass(frozen=True, kw_only=True)
class SuiteSettings:
    """The suites, their sets and settings, whatever models are compared.

    Attributes:
        suite: lexical, exams, single_turn, multi_turn, clinical, healthbench, clinic.
        files: the sets.
        examples: questions that worked examples of the exams are drawn from.
        limit: items of each set, drawn by the seed; None for all.
        seed: of draws, intervals and the clinic's cases.
        base_url: server of the models named openai:NAME.
        max_requests: calls to each of these models, in all runs.
        max_cost: money for each of these models, in all runs.
        prices: file of the price table for these models; None for the one that is shipped.
        template: chat template of saved models; None for their own.
        compute_dtype: of saved models; None for float32 on CPU, else bfloat16.
        slots: responses under way at once, of saved models.
        max_length: tokens of prompt and response of saved models; None for their positions.
        max_new_tokens: of a response; fewer where the model's positions are full.
        temperature: of responses; 0 takes the likeliest token each time.
        top_p: share of the probability that a token is drawn from; a server has its own.
        concurrency: requests to a server under way at once.
        judge: who judges: base_url and model of a server, or offline=rubric for comparisons.
        second_judge: whose verdicts are compared with the judge's.
        patient: of multi_turn: the judge's model from a case of Med-dialog, or the clinic's.
        ending: of a consultation: the patient's goodbye, or a fixed number of exchanges.
        max_exchanges: of a consultation.
        clinic_cases: prompts of the clinic, and cases of its patient.
        exam_by: generation, likelihood, or both.
        exam_form: of the exams' prompts: default, or a published one by name.
        num_examples: worked examples before each exam question.
        tokenizer: of the lexical metrics.
        nfkc: bring texts to NFKC before the lexical metrics.
        average: of BLEU and GLEU, corpus or sentence.
        smoothing: NLTK's method for BLEU.
        conventions: compute the lexical metrics under all conventions, too.
        history: of the clinical suite: reference answers, or the model's own.
        calls: of healthbench: one for each criterion, or one for each row.
        subset: of healthbench that the file holds; it decides the length penalty.
        human: write the blind page of single_turn for doctors; needs two models.
        ratings: files of doctors who rated that page.
        training_data: files in which the test texts are looked for.
    """

    suite: tuple[str, ...] = ()
    files: Files = operational(Files())  # Their content decides.
    examples: ExampleFiles = operational(ExampleFiles())
    limit: int | None = None
    seed: int = 0
    base_url: Text | None = operational(None)
    max_requests: int | None = operational(None)
    max_cost: float | None = operational(None)
    prices: str | None = operational(None)
    template: str | None = None
    compute_dtype: str | None = None
    slots: int = operational(32)
    max_length: int | None = None
    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    concurrency: int = operational(8)
    judge: JudgeConfig = JudgeConfig()
    second_judge: JudgeConfig = JudgeConfig()
    patient: PatientName = "judge"
    ending: Ending = "goodbye"
    max_exchanges: int = 8
    clinic_cases: int = 200
    exam_by: tuple[By, ...] = ("generation",)
    exam_form: str = "default"
    num_examples: int = 0
    tokenizer: Tokenizer = "characters"
    nfkc: bool = False
    average: Average = "corpus"
    smoothing: int = 1
    conventions: bool = False
    history: History = "reference"
    calls: Calls = "criterion"
    subset: Subset = "all"
    human: bool = False
    ratings: tuple[str, ...] = operational(())
    training_data: tuple[str, ...] = operational(())


def given_files(files: Files | ExampleFiles) -> dict[str, tuple[str, ...]]:
    """The fields of files that are given, with their paths."""
    values = {one.name: getattr(files, one.name) for one in fields(files)}
    return {
        name: (value,) if isinstance(value, str) else value
        for name, value in values.items()
        if value
    }


def check_settings(cfg: SuiteSettings, *, flag: str) -> None:
    """Refuses settings that do not go together, or decide nothing, before anything is read.

    Args:
        cfg: the settings.
        flag: stands before a field's name in messages, as `--`.

    Raises:
        ValueError: names the field.
    """
    for name in cfg.suite:
        if name not in SUITE_FILES:
            raise ValueError(f"unknown suite {name!r}; there are {', '.join(SUITE_FILES)}")
    check_once(cfg.suite, name=f"{flag}suite")
    for field in ("limit", "clinic_cases", "slots", "max_new_tokens", "concurrency"):
        value = getattr(cfg, field)
        if value is not None and value < 1:
            raise ValueError(f"{flag}{field}={value} must be at least 1")
    if cfg.seed < 0:
        raise ValueError(f"{flag}seed={cfg.seed} must be at least 0")
    _check_deciding(cfg, flag)
    _check_files(cfg, flag)
    _check_examples(cfg, flag)


def check_once(values: tuple[str, ...], *, name: str) -> None:
    """Raises ValueError for a value that is given twice."""
    twice = [one for one in values if values.count(one) > 1]
    if twice:
        raise ValueError(f"{name}: {twice[0]!r} is given twice")


def _check_deciding(cfg: SuiteSettings, flag: str) -> None:
    """Refuses settings of suites that are not run."""
    default = SuiteSettings()
    for field, suites in _SUITE_FIELDS.items():
        if getattr(cfg, field) != getattr(default, field) and not set(suites) & set(cfg.suite):
            raise _unused(f"{flag}{field}", suites, flag)
    if cfg.clinic_cases != default.clinic_cases and "clinic" not in cfg.suite:
        if cfg.patient != "clinic":
            raise ValueError(
                f"{flag}clinic_cases decides nothing with {flag}patient={cfg.patient}: leave it"
                f" out, or give {flag}patient=clinic"
            )


def _check_files(cfg: SuiteSettings, flag: str) -> None:
    given = given_files(cfg.files)
    for suite, names in SUITE_FILES.items():
        for name in names:
            if name in given and suite not in cfg.suite:
                raise _unused(f"{flag}files.{name}", (suite,), flag)
    if "med_dialog" in given and cfg.patient == "clinic":
        raise ValueError(
            f"{flag}files.med_dialog holds cases for {flag}patient=judge, and {flag}patient=clinic"
            " draws its own: leave one of the two out"
        )
    for of, name in COMPLETIONS.items():
        if name in given and of not in given:
            raise ValueError(f"{flag}files.{name} needs {flag}files.{of}, the questions")


def _check_examples(cfg: SuiteSettings, flag: str) -> None:
    sets, given = given_files(cfg.files), given_files(cfg.examples)
    for name in given:
        if not cfg.num_examples:
            raise ValueError(
                f"{flag}examples.{name} decides nothing with {flag}num_examples=0: leave it out, or"
                " give a number"
            )
        if name not in sets:
            raise ValueError(f"{flag}examples.{name} needs {flag}files.{name}")
    for one in fields(ExampleFiles):
        if cfg.num_examples and one.name in sets and one.name not in given:
            raise ValueError(
                f"{flag}num_examples={cfg.num_examples}, and there are no examples for {one.name};"
                f" give {flag}examples.{one.name}"
            )


def _unused(field: str, suites: tuple[str, ...], flag: str) -> ValueError:
    which = "is of the suite" if len(suites) == 1 else "is of the suites"
    runs = "which is not run" if len(suites) == 1 else "none of which is run"
    return ValueError(
        f"{field} {which} {', '.join(suites)}, {runs}: leave it out, or add the suite to"
        f" {flag}suite"
    )
