"""Opens models, judges and suites of an evaluation, checked before anything is computed."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import NamedTuple

from huatuo_jax.core.files import as_path
from huatuo_jax.core.progress import tell
from huatuo_jax.evaluation import comparing_suites, exam_files, reference_answers
from huatuo_jax.evaluation.clinical import ClinicalConfig, read_clinical
from huatuo_jax.evaluation.comparing_suites import (
    Judges,
    MultiTurnSuite,
    PairJudge,
    SingleTurnSuite,
)
from huatuo_jax.evaluation.consultations import (
    ConsultationSettings,
    clinic_case,
    read_med_dialog,
)
from huatuo_jax.evaluation.graded_suites import ClinicalSuite, HealthBenchSuite
from huatuo_jax.evaluation.healthbench import HealthBenchConfig, read_healthbench
from huatuo_jax.evaluation.lexical import LexicalSettings, Pair, pair_values
from huatuo_jax.evaluation.pairwise import read_kuake_qic
from huatuo_jax.evaluation.respondents import (
    DecodingConfig,
    Respondent,
    SavedRespondent,
    ServerRespondent,
)
from huatuo_jax.evaluation.session import ServerJudge, Suite
from huatuo_jax.evaluation.suite_settings import SUITE_FILES, Files, SuiteSettings
from huatuo_jax.evaluation.suites import ClinicSuite, ExamConfig, ExamSuite, LexicalSuite
from huatuo_jax.judge.chat import ChatModelConfig
from huatuo_jax.judge.config import JudgeConfig, reach_judge
from huatuo_jax.judge.offline import OfflineJudge
from huatuo_jax.judge.server import ServerConfig, key_from_environment
from huatuo_jax.judge.spending import BudgetConfig

SERVER_PREFIX = "openai:"
"""Before the name of a model behind a server."""

_OF_SERVERS = ("base_url", "max_requests", "max_cost", "prices")
_OF_SAVED_MODELS = ("template", "compute_dtype", "max_length", "top_p")


class ModelChoice(NamedTuple):
    """A model to be evaluated.

    Attributes:
        source: folder, Hub id, or openai:NAME for a model behind a server.
        template: chat template of a saved model; None for its own.
        default_system: the template's system text; None for the template's own.
    """

    source: str
    template: str | None = None
    default_system: str | None = None

    @property
    def by_server(self) -> bool:
        """True for a model behind a server."""
        return self.source.startswith(SERVER_PREFIX)


class Opening(NamedTuple):
    """Settings and judges that a suite is opened with.

    Attributes:
        cfg: the settings.
        judges: who compares and grades.
        num_models: that are evaluated.
        flag: stands before a field's name in messages.
    """

    cfg: SuiteSettings
    judges: Judges
    num_models: int
    flag: str


def check_models(cfg: SuiteSettings, models: Mapping[str, ModelChoice], *, flag: str) -> None:
    """Refuses settings that do not go with the models.

    Raises:
        ValueError: names the field.
    """
    by_server = [one.source for one in models.values() if one.by_server]
    if by_server and cfg.base_url is None:
        raise ValueError(f"{by_server[0]} is behind a server: give its {flag}base_url")
    default = SuiteSettings()
    for there, names, whose in (
        (bool(by_server), _OF_SERVERS, f"models named {SERVER_PREFIX}NAME"),
        (len(by_server) < len(models), _OF_SAVED_MODELS, "saved models"),
    ):
        for name in names:
            if not there and getattr(cfg, name) != getattr(default, name):
                raise ValueError(f"{flag}{name} is for {whose}, and there are none: leave it out")
    if by_server and "exams" in cfg.suite and "likelihood" in cfg.exam_by:
        raise ValueError(
            f"{flag}exam_by=likelihood needs a saved model; {by_server[0]} is behind a server, so"
            f" give {flag}exam_by=generation"
        )
    if (cfg.human or cfg.ratings) and len(models) != 2:
        raise ValueError(
            f"{flag}human and {flag}ratings compare two models, and there are {len(models)}"
        )


def open_models(
    cfg: SuiteSettings, models: Mapping[str, ModelChoice], *, dry: bool
) -> dict[str, Respondent]:
    """Opens the models; weights are not read yet.

    Args:
        cfg: the settings.
        models: by their names in tables.
        dry: no key is needed, as nothing is sent.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: a model or its template is not supported, or there is no key for the server.
    """
    decoding = DecodingConfig(
        max_new_tokens=cfg.max_new_tokens,
        temperature=cfg.temperature,
        top_p=cfg.top_p,
        seed=cfg.seed,
    )
    found: dict[str, Respondent] = {}
    for name, model in models.items():
        if model.by_server:
            assert cfg.base_url is not None
            budget = BudgetConfig(max_requests=cfg.max_requests, max_cost=cfg.max_cost)
            server = ChatModelConfig(
                model=model.source.removeprefix(SERVER_PREFIX),
                server=ServerConfig(base_url=cfg.base_url, budget=budget),
                max_tokens=cfg.max_new_tokens,
                temperature=cfg.temperature,
                prices=cfg.prices,
                concurrency=cfg.concurrency,
            )
            if not dry:
                key_from_environment()
            found[name] = ServerRespondent(server)
        else:
            found[name] = SavedRespondent(
                model.source,
                decoding,
                name=name,
                template=cfg.template or model.template,
                default_system=model.default_system,
                compute_dtype=cfg.compute_dtype,
                slots=cfg.slots,
                max_length=cfg.max_length,
            )
    return found


def short_names(models: Sequence[str]) -> list[str]:
    """The shortest ends of the paths that tell the models apart."""
    parts = [
        (one.removeprefix(SERVER_PREFIX),) if one.startswith(SERVER_PREFIX) else _parts(one)
        for one in models
    ]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-length:]) for one in parts]
        if len(set(names)) == len(names):
            return names
    return list(models)


def _parts(path: str) -> tuple[str, ...]:
    return tuple(part for part in pathlib.PurePath(path).parts if part != "/")


def open_judges(cfg: SuiteSettings, output: pathlib.Path, *, flag: str, dry: bool) -> Judges:
    """The judges of the settings, reached before anything is computed.

    Args:
        cfg: the settings.
        output: folder of the judges' replies.
        flag: stands before a field's name in messages.
        dry: nothing is sent.

    Raises:
        ValueError: a field that decides nothing here, a second judge without a first, or a server
            that does not answer.
    """
    judges: list[PairJudge | None] = []
    for field, judge in (("judge", cfg.judge), ("second_judge", cfg.second_judge)):
        for name in ("structured", "clinic_judge"):
            if getattr(judge, name) != getattr(JudgeConfig(), name):
                raise ValueError(f"{flag}{field}.{name} decides nothing here; leave it out")
        if judge.base_url is None:
            if judge.offline == "clinic":
                raise ValueError(f"{flag}{field}.offline=clinic judges no set here; give rubric")
            judges.append(OfflineJudge() if judge.offline == "rubric" else None)
            continue
        model = judge.model
        if not dry:
            reached = reach_judge(judge, field=f"{flag}{field}")
            assert reached is not None
            model = reached.model
        asked = judge.openai(model or "the server's")
        judges.append(
            ServerJudge(
                ChatModelConfig(
                    model=asked.model,
                    server=asked.server,
                    max_tokens=asked.max_tokens,
                    prices=asked.prices,
                    concurrency=cfg.concurrency,
                ),
                output / f"{field}.jsonl",
                key=None if dry else key_from_environment(),
            )
        )
    first, second = judges
    if second is not None and first is None:
        raise ValueError(f"{flag}second_judge is compared with {flag}judge, which is not given")
    if first is not None and second is not None and first.name == second.name:
        raise ValueError(f"{flag}second_judge is {second.name}, as the judge is; give another one")
    return Judges(first=first, second=second)


def open_suites(opening: Opening) -> list[Suite]:
    """The suites of the settings, in their order; each reads and checks its files.

    Raises:
        ValueError: a set or a judge is missing, or a file is in another layout.
    """
    return [_SUITES[name](opening) for name in opening.cfg.suite]


def _lexical(opening: Opening) -> Suite:
    readers: Mapping[str, Callable[[str], list[reference_answers.ReferenceQuestion]]] = {
        "cmedqa2": reference_answers.read_cmedqa2,
        "webmedqa": reference_answers.read_webmedqa,
        "huatuo26m": reference_answers.read_huatuo26m,
    }
    cfg = opening.cfg
    settings = LexicalSettings(
        tokenizer=cfg.tokenizer,
        nfkc=cfg.nfkc,
        average=cfg.average,
        smoothing=cfg.smoothing,
        seed=cfg.seed,
    )
    _check_given(opening, "lexical")
    # The score of a made-up pair needs every library that those of the sets will.
    pair_values(Pair("", "好", ("好",)), settings)
    sets = {
        name: read(path)
        for name, read in readers.items()
        if (path := getattr(cfg.files, name)) is not None
    }
    return LexicalSuite(sets, settings, conventions=cfg.conventions)


def _exams(opening: Opening) -> Suite:
    _check_given(opening, "exams")
    cfg, files = opening.cfg, opening.cfg.files
    exams = ExamConfig(
        by=cfg.exam_by, form=cfg.exam_form, num_examples=cfg.num_examples, seed=cfg.seed
    )
    paths = {
        field.name: getattr(files, field.name) for field in fields(Files) if field.name != "apollo"
    }
    sets = exam_files.read_exam_sets(paths, files.apollo)
    examples = exam_files.read_examples(sets, paths, cfg.examples) if cfg.num_examples else {}
    for found in sets.values():
        if found.excluded:
            tell(found.describe())
    return ExamSuite(sets, examples, exams)


def _single_turn(opening: Opening) -> Suite:
    cfg, judges = opening.cfg, opening.judges
    path = _given(opening, "single_turn", "kuake_qic")
    if judges.first is None and opening.num_models > 1 and not (cfg.human or cfg.ratings):
        other = f"{opening.flag}judge.offline=rubric, or {opening.flag}human"
        raise _needs_judge(opening, "single_turn", other)
    return SingleTurnSuite(read_kuake_qic(path), judges, make_page=cfg.human, ratings=cfg.ratings)


def _multi_turn(opening: Opening) -> Suite:
    cfg, judges, flag = opening.cfg, opening.judges, opening.flag
    settings = ConsultationSettings(ending=cfg.ending, max_exchanges=cfg.max_exchanges)
    if judges.first is None and opening.num_models > 1:
        raise _needs_judge(opening, "multi_turn", f"{flag}judge.offline=rubric")
    if cfg.patient == "clinic":
        drawn = comparing_suites.draw_clinic_cases(cfg.clinic_cases, seed=cfg.seed)
        cases = [clinic_case(one) for one in drawn.values()]
        return MultiTurnSuite(cases, settings, judges, clinic_cases=drawn)
    path = _given(opening, f"multi_turn with {flag}patient=judge", "med_dialog")
    if not isinstance(judges.first, ServerJudge):
        raise ValueError(
            f"{flag}patient=judge needs a model to play the patient: give {flag}judge.base_url and"
            f" {flag}judge.model, or {flag}patient=clinic"
        )
    return MultiTurnSuite(read_med_dialog(path), settings, judges)


def _clinical(opening: Opening) -> Suite:
    path = _given(opening, "clinical", "cmb_clin")
    if not isinstance(opening.judges.first, ServerJudge):
        raise _needs_judge(opening, "clinical", None)
    cfg = opening.cfg
    return ClinicalSuite(read_clinical(path), ClinicalConfig(history=cfg.history, seed=cfg.seed))


def _healthbench(opening: Opening) -> Suite:
    path = _given(opening, "healthbench", "healthbench")
    if not isinstance(opening.judges.first, ServerJudge):
        raise _needs_judge(opening, "healthbench", None)
    cfg = opening.cfg
    return HealthBenchSuite(
        read_healthbench(path),
        HealthBenchConfig(calls=cfg.calls, subset=cfg.subset, seed=cfg.seed),
    )


def _clinic(opening: Opening) -> Suite:
    return ClinicSuite(opening.cfg.clinic_cases, seed=opening.cfg.seed)


_SUITES: Mapping[str, Callable[[Opening], Suite]] = {
    "lexical": _lexical,
    "exams": _exams,
    "single_turn": _single_turn,
    "multi_turn": _multi_turn,
    "clinical": _clinical,
    "healthbench": _healthbench,
    "clinic": _clinic,
}
assert set(_SUITES) == set(SUITE_FILES)


def _needs_judge(opening: Opening, suite: str, other: str | None) -> ValueError:
    """The error where nobody judges."""
    beside = f", or {other}" if other else ""
    flag = opening.flag
    return ValueError(
        f"{suite} needs a judge: give {flag}judge.base_url and {flag}judge.model{beside}"
    )


def _given(opening: Opening, suite: str, name: str) -> str:
    """The path of a set.

    Raises:
        ValueError: none is given, or nothing is there.
    """
    path: str | None = getattr(opening.cfg.files, name)
    if path is None:
        raise ValueError(f"{suite} needs its set: give {opening.flag}files.{name}")
    if not as_path(path).exists():
        raise ValueError(f"{path}: there is no such file ({opening.flag}files.{name})")
    return path


def _check_given(opening: Opening, suite: str) -> None:
    names = [name for name in SUITE_FILES[suite] if name not in exam_files.COMPLETIONS.values()]
    if not any(getattr(opening.cfg.files, name) for name in names):
        flags_named = ", ".join(f"{opening.flag}files.{name}" for name in names)
        raise ValueError(f"{suite} needs a set: give one of {flags_named}")
