"""Compare models on exams, patients' questions and consultations: figures and a page."""

import dataclasses
import importlib.metadata
import itertools
import json
import pathlib
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from huatuo_jax.core.files import write_file
from huatuo_jax.core.progress import tell
from huatuo_jax.evaluation import comparing_suites, exam_files, reference_answers
from huatuo_jax.evaluation.asking import ChatModelConfig
from huatuo_jax.evaluation.clinical import ClinicalConfig, History, read_clinical
from huatuo_jax.evaluation.comparing_suites import (
    Judges,
    MultiTurnSuite,
    PairJudge,
    PatientName,
    SingleTurnSuite,
)
from huatuo_jax.evaluation.consultations import (
    ConsultationSettings,
    Ending,
    clinic_case,
    read_med_dialog,
)
from huatuo_jax.evaluation.contamination import overlaps_with_files
from huatuo_jax.evaluation.exam_files import ExampleFiles
from huatuo_jax.evaluation.graded_suites import ClinicalSuite, HealthBenchSuite
from huatuo_jax.evaluation.healthbench import Calls, HealthBenchConfig, Subset, read_healthbench
from huatuo_jax.evaluation.lexical import Average, LexicalSettings, Tokenizer
from huatuo_jax.evaluation.pairwise import read_kuake_qic
from huatuo_jax.evaluation.respondents import (
    DecodingConfig,
    Respondent,
    SavedRespondent,
    ServerRespondent,
)
from huatuo_jax.evaluation.session import ServerJudge, Session, Suite
from huatuo_jax.evaluation.suites import (
    By,
    ClinicSuite,
    ExamConfig,
    ExamSuite,
    LexicalSuite,
)
from huatuo_jax.judge.config import JudgeConfig, reach_judge
from huatuo_jax.judge.offline import OfflineJudge
from huatuo_jax.judge.server import ServerConfig, key_from_environment
from huatuo_jax.judge.spending import BudgetConfig
from huatuo_jax.report.evaluation_page import write_page

FORMAT = "huatuo-evaluation-1"
RESULTS_FILE = "evaluation.json"
PAGE_FILE = "report.html"

_PACKAGES = ("huatuo_jax", "jax", "numpy", "transformers", "nltk", "jieba", "rapidfuzz")
_SERVER_PREFIX = "openai:"
_LEXICAL = ("cmedqa2", "webmedqa", "huatuo26m")


@dataclasses.dataclass(frozen=True, kw_only=True)
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """Compare models on exams, patients' questions and consultations: figures and a page.

    Attributes:
        model: folders or Hub ids, or openai:NAME for a model behind a server.
        suite: lexical, exams, single_turn, multi_turn, clinical, healthbench, clinic.
        output: folder of results; a run that was killed resumes there.
        names: of the models in tables, in their order; none for the ends of their paths.
        files: the sets.
        examples: questions that worked examples of the exams are drawn from.
        limit: items of each set, drawn by the seed; None for all.
        seed: of draws, intervals and the clinic's cases.
        dry_run: tell the number of requests, tokens and cost; nothing is sent or computed.
        base_url: server of the models named openai:NAME.
        max_requests: calls to each of these models, in all runs.
        max_cost: money for each of these models, in all runs.
        prices: file of the price table for these models; None for the one that is shipped.
        template: chat template of saved models; None for their own.
        compute_dtype: of saved models; None for float32 on CPU, else bfloat16.
        slots: responses under way at once, of saved models.
        max_length: tokens of prompt and response of saved models; None for their positions.
        max_new_tokens: of a response.
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

    model: tuple[str, ...]
    suite: tuple[str, ...]
    output: str
    names: tuple[str, ...] = ()
    files: Files = Files()
    examples: ExampleFiles = ExampleFiles()
    limit: int | None = None
    seed: int = 0
    dry_run: bool = False
    base_url: str | None = None
    max_requests: int | None = None
    max_cost: float | None = None
    prices: str | None = None
    template: str | None = None
    compute_dtype: str | None = None
    slots: int = 32
    max_length: int | None = None
    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    concurrency: int = 8
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
    ratings: tuple[str, ...] = ()
    training_data: tuple[str, ...] = ()


def main(flags: Flags) -> None:
    """Evaluates, and says where figures and page are."""
    _check(flags)
    output = pathlib.Path(flags.output)
    judges = _open_judges(flags, output)
    suites = [SUITES[name](flags, judges) for name in flags.suite]
    for path in flags.training_data:
        if not pathlib.Path(path).exists():
            raise ValueError(f"{path}: there is no such file or folder")
    models = _open_models(flags)
    session = Session(
        models,
        output,
        judge=judges.first if isinstance(judges.first, ServerJudge) else None,
        second_judge=judges.second if isinstance(judges.second, ServerJudge) else None,
        seed=flags.seed,
        limit=flags.limit,
        max_new_tokens=flags.max_new_tokens,
        dry=flags.dry_run,
    )
    if flags.dry_run:
        for suite in suites:
            suite.run(session)
        for line in session.plan_lines():
            print(line)
        print("nothing was sent or computed; unreadable replies are asked for twice more")
        return
    # One model after the other, so that each is loaded once.
    for model, suite in itertools.product(models, suites):
        suite.answer(session, model)
    result: dict[str, Any] = {
        "format": FORMAT,
        "settings": _settings(flags),
        "models": {name: one.settings() for name, one in models.items()},
        "judge": _judge_settings(judges.first),
        "second_judge": _judge_settings(judges.second),
        "versions": _versions(),
        "suites": {},
        "contamination": None,
    }
    for suite in suites:
        result["suites"][suite.name] = suite.run(session)
        tell(f"{suite.name}: done")
    if flags.training_data:
        tests = {suite.name: suite.test_texts() for suite in suites}
        result["contamination"] = overlaps_with_files(tests, flags.training_data)
    output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, ensure_ascii=False, indent=1, allow_nan=False)
    write_file(output / RESULTS_FILE, text.encode("utf-8", "replace"))
    write_page(result, output / PAGE_FILE)
    if flags.human:
        folder = output / comparing_suites.HUMAN_FOLDER
        print(f"page for doctors: {folder / 'human.html'}; keep {folder / 'human_key.json'} back")
    print(f"written: {output / RESULTS_FILE}, {output / PAGE_FILE}")


def _check(flags: Flags) -> None:
    """Raises ValueError for flags that do not go together, before anything is read."""
    for name in flags.suite:
        if name not in SUITES:
            raise ValueError(f"unknown suite {name!r}; there are {', '.join(SUITES)}")
    for field in ("model", "suite", "names"):
        given = getattr(flags, field)
        twice = [one for one in given if given.count(one) > 1]
        if twice:
            raise ValueError(f"--{field}: {twice[0]!r} is given twice")
    if flags.names and len(flags.names) != len(flags.model):
        raise ValueError(f"--names has {len(flags.names)} for {len(flags.model)} models")
    for field in ("limit", "clinic_cases", "slots", "max_new_tokens", "concurrency"):
        value = getattr(flags, field)
        if value is not None and value < 1:
            raise ValueError(f"--{field}={value} must be at least 1")
    if flags.seed < 0:
        raise ValueError(f"--seed={flags.seed} must be at least 0")
    by_server = [one for one in flags.model if one.startswith(_SERVER_PREFIX)]
    if by_server and flags.base_url is None:
        raise ValueError(f"{by_server[0]} is behind a server: give its --base_url")
    if flags.base_url is not None and not by_server:
        raise ValueError("--base_url is for models named openai:NAME, and --model has none")
    if by_server and "exams" in flags.suite and "likelihood" in flags.exam_by:
        raise ValueError(
            f"--exam_by=likelihood needs a saved model; {by_server[0]} is behind a server, so give"
            " --exam_by=generation"
        )
    if (flags.human or flags.ratings) and "single_turn" not in flags.suite:
        raise ValueError("--human and --ratings are of --suite=single_turn; add it")
    if (flags.human or flags.ratings) and len(flags.model) != 2:
        raise ValueError(
            f"--human and --ratings compare two models, and --model has {len(flags.model)}"
        )


def _open_models(flags: Flags) -> dict[str, Respondent]:
    """The models by their names in tables; weights are not read yet."""
    decoding = DecodingConfig(
        max_new_tokens=flags.max_new_tokens,
        temperature=flags.temperature,
        top_p=flags.top_p,
        seed=flags.seed,
    )
    names = flags.names or _short_names(flags.model)
    found: dict[str, Respondent] = {}
    for name, model in zip(names, flags.model, strict=True):
        if model.startswith(_SERVER_PREFIX):
            assert flags.base_url is not None
            budget = BudgetConfig(max_requests=flags.max_requests, max_cost=flags.max_cost)
            cfg = ChatModelConfig(
                model=model.removeprefix(_SERVER_PREFIX),
                server=ServerConfig(base_url=flags.base_url, budget=budget),
                max_tokens=flags.max_new_tokens,
                temperature=flags.temperature,
                prices=flags.prices,
                concurrency=flags.concurrency,
            )
            if not flags.dry_run:
                key_from_environment()
            found[name] = ServerRespondent(cfg)
        else:
            found[name] = SavedRespondent(
                model,
                decoding,
                name=name,
                template=flags.template,
                compute_dtype=flags.compute_dtype,
                slots=flags.slots,
                max_length=flags.max_length,
            )
    return found


def _short_names(models: Sequence[str]) -> list[str]:
    """The shortest ends of the paths that tell the models apart."""
    parts = [
        (one.removeprefix(_SERVER_PREFIX),) if one.startswith(_SERVER_PREFIX) else _parts(one)
        for one in models
    ]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-length:]) for one in parts]
        if len(set(names)) == len(names):
            return names
    return list(models)


def _parts(path: str) -> tuple[str, ...]:
    return tuple(part for part in pathlib.PurePath(path).parts if part != "/")


def _open_judges(flags: Flags, output: pathlib.Path) -> Judges:
    """The judges of the flags, reached before anything is computed."""
    judges: list[PairJudge | None] = []
    for field, cfg in (("judge", flags.judge), ("second_judge", flags.second_judge)):
        for name in ("structured", "clinic_judge"):
            if getattr(cfg, name) != getattr(JudgeConfig(), name):
                raise ValueError(f"--{field}.{name} decides nothing here; leave it out")
        if cfg.base_url is None:
            if cfg.offline == "clinic":
                raise ValueError(f"--{field}.offline=clinic judges no set here; give rubric")
            judges.append(OfflineJudge() if cfg.offline == "rubric" else None)
            continue
        model = cfg.model
        if not flags.dry_run:
            reached = reach_judge(cfg, field=f"--{field}")
            assert reached is not None
            model = reached.model
        asked = cfg.openai(model or "the server's")
        judges.append(
            ServerJudge(
                ChatModelConfig(
                    model=asked.model,
                    server=asked.server,
                    max_tokens=asked.max_tokens,
                    prices=asked.prices,
                    concurrency=flags.concurrency,
                ),
                output / f"{field}.jsonl",
                key=None if flags.dry_run else key_from_environment(),
            )
        )
    first, second = judges
    if second is not None and first is None:
        raise ValueError("--second_judge is compared with --judge, which is not given")
    if first is not None and second is not None and first.name == second.name:
        raise ValueError(f"--second_judge is {second.name}, as the judge is; give another one")
    return Judges(first=first, second=second)


def _lexical(flags: Flags, judges: Judges) -> Suite:
    readers: Mapping[str, Callable[[str], list[reference_answers.ReferenceQuestion]]] = {
        "cmedqa2": reference_answers.read_cmedqa2,
        "webmedqa": reference_answers.read_webmedqa,
        "huatuo26m": reference_answers.read_huatuo26m,
    }
    settings = LexicalSettings(
        tokenizer=flags.tokenizer,
        nfkc=flags.nfkc,
        average=flags.average,
        smoothing=flags.smoothing,
        seed=flags.seed,
    )
    _check_given(flags, "lexical", _LEXICAL)
    sets = {
        name: read(path)
        for name, read in readers.items()
        if (path := getattr(flags.files, name)) is not None
    }
    return LexicalSuite(sets, settings, conventions=flags.conventions)


def _exams(flags: Flags, judges: Judges) -> Suite:
    names = (*exam_files.EXAMS, "cmmlu", "ceval", "mmlu", "apollo")
    _check_given(flags, "exams", names)
    cfg = ExamConfig(
        by=flags.exam_by, form=flags.exam_form, num_examples=flags.num_examples, seed=flags.seed
    )
    paths = {
        field.name: getattr(flags.files, field.name)
        for field in dataclasses.fields(Files)
        if field.name != "apollo"
    }
    sets = exam_files.read_exam_sets(paths, flags.files.apollo)
    examples = exam_files.read_examples(sets, paths, flags.examples) if cfg.num_examples else {}
    for found in sets.values():
        if found.excluded:
            tell(found.describe())
    return ExamSuite(sets, examples, cfg)


def _single_turn(flags: Flags, judges: Judges) -> Suite:
    path = _given(flags, "single_turn", "kuake_qic")
    if judges.first is None and len(flags.model) > 1 and not (flags.human or flags.ratings):
        raise ValueError(_needs_judge("single_turn", "--judge.offline=rubric, or --human"))
    return SingleTurnSuite(
        read_kuake_qic(path), judges, make_page=flags.human, ratings=flags.ratings
    )


def _multi_turn(flags: Flags, judges: Judges) -> Suite:
    settings = ConsultationSettings(ending=flags.ending, max_exchanges=flags.max_exchanges)
    if judges.first is None and len(flags.model) > 1:
        raise ValueError(_needs_judge("multi_turn", "--judge.offline=rubric"))
    if flags.patient == "clinic":
        drawn = comparing_suites.draw_clinic_cases(flags.clinic_cases, seed=flags.seed)
        cases = [clinic_case(one) for one in drawn.values()]
        return MultiTurnSuite(cases, settings, judges, clinic_cases=drawn)
    path = _given(flags, "multi_turn with --patient=judge", "med_dialog")
    if not isinstance(judges.first, ServerJudge):
        raise ValueError(
            "--patient=judge needs a model to play the patient: give --judge.base_url and"
            " --judge.model, or --patient=clinic"
        )
    return MultiTurnSuite(read_med_dialog(path), settings, judges)


def _clinical(flags: Flags, judges: Judges) -> Suite:
    path = _given(flags, "clinical", "cmb_clin")
    if not isinstance(judges.first, ServerJudge):
        raise ValueError(_needs_judge("clinical", None))
    return ClinicalSuite(
        read_clinical(path), ClinicalConfig(history=flags.history, seed=flags.seed)
    )


def _healthbench(flags: Flags, judges: Judges) -> Suite:
    path = _given(flags, "healthbench", "healthbench")
    if not isinstance(judges.first, ServerJudge):
        raise ValueError(_needs_judge("healthbench", None))
    return HealthBenchSuite(
        read_healthbench(path),
        HealthBenchConfig(calls=flags.calls, subset=flags.subset, seed=flags.seed),
    )


def _clinic(flags: Flags, judges: Judges) -> Suite:
    return ClinicSuite(flags.clinic_cases, seed=flags.seed)


SUITES: Mapping[str, Callable[[Flags, Judges], Suite]] = {
    "lexical": _lexical,
    "exams": _exams,
    "single_turn": _single_turn,
    "multi_turn": _multi_turn,
    "clinical": _clinical,
    "healthbench": _healthbench,
    "clinic": _clinic,
}
"""Each reads and checks its files."""


def _needs_judge(suite: str, other: str | None) -> str:
    """The message where nobody judges."""
    beside = f", or {other}" if other else ""
    return f"{suite} needs a judge: give --judge.base_url and --judge.model{beside}"


def _given(flags: Flags, suite: str, name: str) -> str:
    """The path of a set.

    Raises:
        ValueError: none is given, or nothing is there.
    """
    path: str | None = getattr(flags.files, name)
    if path is None:
        raise ValueError(f"{suite} needs its set: give --files.{name}")
    if not pathlib.Path(path).exists():
        raise ValueError(f"{path}: there is no such file (--files.{name})")
    return path


def _check_given(flags: Flags, suite: str, names: Sequence[str]) -> None:
    if not any(getattr(flags.files, name) for name in names):
        flags_named = ", ".join(f"--files.{name}" for name in names)
        raise ValueError(f"{suite} needs a set: give one of {flags_named}")


def _judge_settings(judge: PairJudge | None) -> dict[str, Any] | None:
    if judge is None:
        return None
    return dict(judge.settings() if isinstance(judge, ServerJudge) else judge.settings)


def _settings(flags: Flags) -> dict[str, Any]:
    """The flags; servers' keys are no flags."""
    found = dataclasses.asdict(flags)
    for name in ("judge", "second_judge", "examples", "files"):
        found[name] = {key: value for key, value in found[name].items() if value is not None}
    return found


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
