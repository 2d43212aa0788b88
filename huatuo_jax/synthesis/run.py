"""Makes a kind of data by its settings: who is asked, of what, and where rows and report go."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

from huatuo_jax.core.config import Text, operational
from huatuo_jax.core.files import as_path
from huatuo_jax.core.progress import tell
from huatuo_jax.evaluation.consultations import Speaker
from huatuo_jax.evaluation.respondents import DecodingConfig, SavedRespondent, ServerRespondent
from huatuo_jax.judge.chat import ChatModelConfig
from huatuo_jax.judge.server import OPENAI_URL, ServerConfig, key_from_environment
from huatuo_jax.judge.spending import BudgetConfig, Price, RateLimits, read_price
from huatuo_jax.synthesis.clinic_teacher import ClinicTeacher, clinic_table
from huatuo_jax.synthesis.conversations import ConversationMaker, TeachingCases
from huatuo_jax.synthesis.decontamination import EvaluationTexts, read_test_texts
from huatuo_jax.synthesis.instructions import InstructionMaker, read_seeds
from huatuo_jax.synthesis.jobs import Maker, Task
from huatuo_jax.synthesis.polishing import PolishingMaker, read_sources
from huatuo_jax.synthesis.report import RunFacts, write_report
from huatuo_jax.synthesis.runner import Checks, PersonalData, Runner, plan
from huatuo_jax.synthesis.tables import LANGUAGES, read_table
from huatuo_jax.synthesis.teachers import ModelTeacher, SharedTeacher, Teacher
from huatuo_jax.synthesis.verifiable import VerifiableMaker, read_exam_questions

SynthesisKind = Literal[
    "distilled_instruction",
    "distilled_conversation",
    "real_instruction",
    "real_conversation",
    "verifiable",
]
Style = Literal["instructions", "questions"]

CLINIC = "clinic"
SERVER_PREFIX = "openai:"
FLAG = "--"
"""Before a field's name in the messages of the command."""

_CLINIC_TASKS: frozenset[Task] = frozenset({"instruct", "patient", "question", "verify"})
_Made = tuple[Maker, dict[str, str]]
_AT_LEAST_1 = (
    "num_rows",
    "batch_size",
    "per_request",
    "max_exchanges",
    "attempts",
    "max_new_tokens",
    "concurrency",
    "slots",
    "max_requests",
    "requests_per_minute",
    "tokens_per_minute",
)
_OF_SERVERS = ("base_url", "max_cost", "max_requests", "requests_per_minute", "tokens_per_minute")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SynthesisSettings:
    """The teacher, and what is asked of it, whatever the kind.

    Attributes:
        teacher: openai:NAME behind a server, a saved model's folder or Hub id, or clinic.
        asks: how a saved model is asked: by instructions, or by bare questions where it only
            answers as a doctor; the clinic then writes the questions and plays the patient.
        num_rows: rows wanted; the last batch may give some more.
        batch_size: jobs that are taken together.
        seed: of all draws.
        languages: of instructions: zh, en, or both in balance. Of cases: those in others are left
            out.
        seeds: file of instructions to start from; None for those that are shipped.
        table: file of departments, roles and use cases; None for the one that is shipped.
        per_request: instructions that one request asks for.
        source: files of real dialogues, whose doctors' words are polished, or of exam questions,
            those of a published set as SET:FILE (cmexam:test.csv).
        cases: files of cases with their diagnoses, for conversations.
        max_exchanges: of a conversation.
        attempts: requests for a turn of a conversation, or for polished words, at most: what the
            checks find faulty is asked for again. So many conversations over a case, too, where
            a turn stays faulty, or they end without advice or the diagnosis. What would be said
            again, as by the clinic's patient or at temperature 0, is asked for once.
        num_answers: times that an open question is answered to see that it is clear.
        near_duplicate: prompts whose ROUGE-L F of characters with an earlier one or a seed is
            above this are left out.
        evaluation_sets: files whose texts no row may hold.
        personal_data: mask names, numbers and addresses, reject rows that have some, or keep them.
        base_url: server of the teacher.
        max_cost: money that all runs for this output may spend, in the price table's currency.
        max_requests: calls that all runs for this output may make.
        requests_per_minute: what the server allows.
        tokens_per_minute: what the server allows.
        timeout_s: seconds that a call may take.
        prices: file of the price table; None for the one that is shipped.
        concurrency: requests to a server under way at once.
        temperature: of the teacher.
        max_new_tokens: of a reply.
        template: chat template of a saved model; None for its own.
        compute_dtype: of a saved model; None for float32 on CPU, else bfloat16.
        slots: replies of a saved model under way at once.
    """

    teacher: str = CLINIC
    asks: Style = "instructions"
    num_rows: int = 1_000
    batch_size: int = 16
    seed: int = 0
    languages: tuple[str, ...] = ("zh",)
    seeds: str | None = operational(None)
    table: str | None = operational(None)
    per_request: int = 4
    source: tuple[str, ...] = operational(())
    cases: tuple[str, ...] = operational(())
    max_exchanges: int = 8
    attempts: int = 3
    num_answers: int = 2
    near_duplicate: float = 0.7
    evaluation_sets: tuple[str, ...] = operational(())
    personal_data: PersonalData = "mask"
    base_url: Text | None = operational(None)
    max_cost: float | None = operational(None)
    max_requests: int | None = operational(None)
    requests_per_minute: int | None = operational(None)
    tokens_per_minute: int | None = operational(None)
    timeout_s: float = operational(120.0)
    prices: str | None = operational(None)
    concurrency: int = operational(8)
    temperature: float = 0.7
    max_new_tokens: int = 1_024
    template: str | None = None
    compute_dtype: str | None = None
    slots: int = operational(32)

    @property
    def uses_clinic(self) -> bool:
        """Returns True if the clinic writes the questions and plays the patient."""
        return self.teacher == CLINIC or self.asks == "questions"


def check_settings(kind: SynthesisKind, cfg: SynthesisSettings, *, flag: str = FLAG) -> None:
    """Refuses settings that do not go together, or decide nothing, before anything is read.

    Args:
        kind: of the data.
        cfg: the settings.
        flag: stands before a field's name in messages.

    Raises:
        ValueError: names the field.
    """
    if not cfg.teacher.removeprefix(SERVER_PREFIX):
        raise ValueError(f"{flag}teacher is empty: name a saved model, openai:NAME or {CLINIC}")
    for name in _AT_LEAST_1:
        value = getattr(cfg, name)
        if value is not None and value < 1:
            raise ValueError(f"{flag}{name}={value} must be at least 1")
    for name in ("max_cost", "timeout_s"):
        value = getattr(cfg, name)
        if value is not None and not value > 0:
            raise ValueError(f"{flag}{name}={value:g} must be above 0")
    if not 0 < cfg.near_duplicate <= 1:
        raise ValueError(
            f"{flag}near_duplicate={cfg.near_duplicate:g} must be above 0 and at most 1"
        )
    if cfg.num_answers < 0:
        raise ValueError(f"{flag}num_answers={cfg.num_answers} must be at least 0")
    if cfg.seed < 0:
        raise ValueError(f"{flag}seed={cfg.seed} must be at least 0")
    wrong = [one for one in cfg.languages if one not in LANGUAGES]
    if wrong or not cfg.languages or len(set(cfg.languages)) < len(cfg.languages):
        raise ValueError(f"{flag}languages={','.join(cfg.languages)} should be zh, en or zh,en")
    if not 0 <= cfg.temperature < float("inf"):
        raise ValueError(f"{flag}temperature={cfg.temperature:g} must be a number of at least 0")
    by_server = cfg.teacher.startswith(SERVER_PREFIX)
    for name in () if by_server else _OF_SERVERS:
        if getattr(cfg, name) is not None:
            raise ValueError(
                f"{flag}{name} is for a teacher named openai:NAME, and {flag}teacher is"
                f" {cfg.teacher}"
            )
    if cfg.asks == "questions" and (by_server or cfg.teacher == CLINIC):
        raise ValueError(f"{flag}asks=questions is for a saved model, given by {flag}teacher=DIR")
    if cfg.asks == "questions" and kind == "verifiable":
        raise ValueError("verifiable needs a teacher that follows instructions")
    if cfg.uses_clinic and cfg.languages != ("zh",):
        raise ValueError(f"{flag}languages: the clinic writes Chinese alone")
    for name in ("seeds", "table"):
        if cfg.uses_clinic and getattr(cfg, name) is not None:
            raise ValueError(f"{flag}{name} is not used where the clinic writes the questions")


def is_saved_model(teacher: str) -> bool:
    """Returns True if a teacher is a saved model, which this process computes."""
    return teacher != CLINIC and not teacher.startswith(SERVER_PREFIX)


class Synthesis:
    """One kind of data, its settings checked and its files read."""

    def __init__(
        self, kind: SynthesisKind, cfg: SynthesisSettings, output: pathlib.Path, *, flag: str = FLAG
    ) -> None:
        """Reads seeds, sources and cases, and finds the teacher; nothing is sent or computed.

        Args:
            kind: of the data.
            cfg: the settings.
            output: the file of rows.
            flag: stands before a field's name in messages.

        Raises:
            ValueError: a file or setting is wrong.
            OSError: a file cannot be read, or there is no such model.
        """
        check_settings(kind, cfg, flag=flag)
        self._kind, self._cfg, self._output = kind, cfg, output
        self._maker, self._known = MAKERS[kind](kind, cfg, flag)
        self._tests = EvaluationTexts(
            read_test_texts(cfg.evaluation_sets), threshold=cfg.near_duplicate
        )
        self._teacher, self._price = open_teacher(cfg, output, flag=flag)

    def plan(self) -> list[str]:
        """Returns what a run may send, in lines; see `runner.plan`."""
        return plan(self._maker, self._teacher, num_rows=self._cfg.num_rows)

    def run(self) -> dict[str, Any]:
        """Makes the rows, their report and their card, resuming; returns the report's figures.

        Raises:
            ValueError: the output is of other settings, or the teacher cannot go on; what was made
                is written.
            OSError: a file cannot be written.
        """
        cfg = self._cfg
        if cfg.teacher.startswith(SERVER_PREFIX):
            key_from_environment()
        runner = Runner(
            self._maker,
            self._teacher,
            self._output,
            checks=Checks(near_duplicate=cfg.near_duplicate, personal_data=cfg.personal_data),
            known_prompts=self._known,
            tests=self._tests,
        )
        try:
            outcome = runner.run(cfg.num_rows)
        finally:
            self._teacher.release()
        facts = RunFacts(
            kind=self._kind,
            teacher=self._teacher.name,
            settings=dataclasses.asdict(cfg),
            totals=self._teacher.totals(),
            price=self._price,
            num_known_prompts=len(self._known),
            num_tests=len(self._tests),
        )
        figures = write_report(outcome, facts, self._output)
        if outcome.ended is not None:
            tell(f"fewer rows than wanted: {outcome.ended}")
        if outcome.stopped is not None:
            raise ValueError(f"{outcome.stopped} (the rows that are done are in {self._output})")
        return figures


def open_teacher(
    cfg: SynthesisSettings, output: pathlib.Path, *, flag: str
) -> tuple[Teacher, Price | None]:
    """Returns the teacher of the settings and the price of its tokens; nothing is sent yet.

    Raises:
        ValueError: no such model, or a budget of money for a model without a price.
    """
    clinic = ClinicTeacher(seed=cfg.seed)
    if cfg.teacher == CLINIC:
        return clinic, None
    replies = as_path(f"{output}.replies")
    if cfg.teacher.startswith(SERVER_PREFIX):
        model = cfg.teacher.removeprefix(SERVER_PREFIX)
        spending = as_path(f"{output}.spending.jsonl")
        price = read_price(model, cfg.prices)
        if price is None and cfg.max_cost is not None:
            raise ValueError(
                f"{flag}max_cost={cfg.max_cost:g} needs a price for {model!r}: add it to a copy of"
                f" the price table and name the copy by {flag}prices"
            )
        respondent = ServerRespondent(_chat_model(cfg, model), spending=spending)
        return ModelTeacher(respondent, replies, spending=spending), price
    decoding = DecodingConfig(
        max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature, seed=cfg.seed
    )
    try:
        saved = SavedRespondent(
            cfg.teacher,
            decoding,
            template=cfg.template,
            compute_dtype=cfg.compute_dtype,
            slots=cfg.slots,
        )
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{flag}teacher: {error}; a model behind a server is named {SERVER_PREFIX}NAME"
        ) from error
    plain = cfg.asks == "questions"
    teacher = ModelTeacher(saved, replies, spending=None, plain=plain)
    return (SharedTeacher(teacher, clinic, seconds=_CLINIC_TASKS) if plain else teacher), None


def _chat_model(cfg: SynthesisSettings, model: str) -> ChatModelConfig:
    return ChatModelConfig(
        model=model,
        server=ServerConfig(
            base_url=cfg.base_url or OPENAI_URL,
            budget=BudgetConfig(max_requests=cfg.max_requests, max_cost=cfg.max_cost),
            limits=RateLimits(requests=cfg.requests_per_minute, tokens=cfg.tokens_per_minute),
            timeout_s=cfg.timeout_s,
        ),
        max_tokens=cfg.max_new_tokens,
        temperature=cfg.temperature,
        prices=cfg.prices,
        concurrency=cfg.concurrency,
    )


def _distilled_instruction(kind: SynthesisKind, cfg: SynthesisSettings, flag: str) -> _Made:
    seeds = read_seeds(cfg.seeds)
    maker = InstructionMaker(
        seeds=seeds,
        table=clinic_table() if cfg.uses_clinic else read_table(cfg.table),
        languages=cfg.languages,
        seed=cfg.seed,
        batch_size=cfg.batch_size,
        per_request=cfg.per_request,
    )
    return maker, {one.id: one.prompt for one in seeds}


def _distilled_conversation(kind: SynthesisKind, cfg: SynthesisSettings, flag: str) -> _Made:
    if cfg.uses_clinic:
        if cfg.cases:
            raise ValueError(f"{flag}cases is not used where the clinic plays the patient")
        cases = TeachingCases.of_clinic(seed=cfg.seed)
    elif cfg.cases:
        cases = TeachingCases.of_files(cfg.cases, languages=cfg.languages)
        if not cases.count:
            raise ValueError(
                f"{flag}cases: all {cases.left_out} are in another language than {flag}languages="
                f"{','.join(cfg.languages)}"
            )
        if cases.left_out:
            tell(f"cases: {cases.left_out} are not in {' or '.join(cfg.languages)}, and left out")
    else:
        raise ValueError(f"distilled_conversation needs cases: give {flag}cases=FILE")
    fixed: set[Speaker] = {"user"} if cfg.uses_clinic else set()
    if cfg.teacher == CLINIC or not cfg.temperature:
        fixed = {"user", "assistant"}
    maker = ConversationMaker(
        cases=cases,
        max_exchanges=cfg.max_exchanges,
        attempts=cfg.attempts,
        fixed=frozenset(fixed),
        seed=cfg.seed,
        batch_size=cfg.batch_size,
    )
    return maker, {}


def _real(kind: SynthesisKind, cfg: SynthesisSettings, flag: str) -> _Made:
    assert kind in ("real_instruction", "real_conversation")
    if not cfg.source:
        raise ValueError(f"{kind} needs real dialogues: give {flag}source=FILE")
    sources = read_sources(cfg.source, kind)
    for reason, count in sources.left_out.items():
        tell(f"source: {count} rows are {reason}, and left out")
    maker = PolishingMaker(
        kind=kind,
        dialogues=sources.dialogues,
        plain=cfg.asks == "questions",
        attempts=cfg.attempts if cfg.temperature else 1,
        seed=cfg.seed,
        batch_size=cfg.batch_size,
    )
    return maker, {}


def _verifiable(kind: SynthesisKind, cfg: SynthesisSettings, flag: str) -> _Made:
    if not cfg.source:
        raise ValueError(f"verifiable needs exam questions: give {flag}source=FILE")
    maker = VerifiableMaker(
        questions=read_exam_questions(cfg.source),
        num_answers=cfg.num_answers,
        seed=cfg.seed,
        batch_size=cfg.batch_size,
    )
    return maker, {}


MAKERS: Mapping[str, Callable[[SynthesisKind, SynthesisSettings, str], _Made]] = {
    "distilled_instruction": _distilled_instruction,
    "distilled_conversation": _distilled_conversation,
    "real_instruction": _real,
    "real_conversation": _real,
    "verifiable": _verifiable,
}
"""By kind, what reads its files: the maker, and the prompts that are known before."""
