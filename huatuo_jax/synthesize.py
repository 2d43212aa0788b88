"""Make training data of the paper's four kinds, and open questions, by a teacher model."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Literal

from huatuo_jax.core.config import Text
from huatuo_jax.core.progress import tell
from huatuo_jax.evaluation.asking import ChatModelConfig
from huatuo_jax.evaluation.respondents import DecodingConfig, SavedRespondent, ServerRespondent
from huatuo_jax.judge.server import OPENAI_URL, ServerConfig, key_from_environment
from huatuo_jax.judge.spending import BudgetConfig, Price, RateLimits, read_price
from huatuo_jax.synthesis.clinic_teacher import ClinicTeacher, clinic_table
from huatuo_jax.synthesis.conversations import (
    ConversationMaker,
    clinic_teaching_cases,
    read_teaching_cases,
)
from huatuo_jax.synthesis.decontamination import EvaluationTexts, read_test_texts
from huatuo_jax.synthesis.instructions import InstructionMaker, read_seeds
from huatuo_jax.synthesis.jobs import Maker, Task
from huatuo_jax.synthesis.polishing import PolishingMaker, read_sources
from huatuo_jax.synthesis.report import RunFacts, write_report
from huatuo_jax.synthesis.runner import Checks, PersonalData, Runner, plan
from huatuo_jax.synthesis.tables import LANGUAGES, read_table
from huatuo_jax.synthesis.teachers import ModelTeacher, SharedTeacher, Teacher
from huatuo_jax.synthesis.verifiable import VerifiableMaker, read_exam_questions

Kind = Literal[
    "distilled_instruction",
    "distilled_conversation",
    "real_instruction",
    "real_conversation",
    "verifiable",
]
Style = Literal["instructions", "questions"]

CLINIC = "clinic"
_CLINIC_SPARE = 4  # Cases of the clinic for each row that is wanted.
_SERVER_PREFIX = "openai:"
_CLINIC_TASKS: frozenset[Task] = frozenset({"instruct", "patient", "question", "verify"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """Make training data of the paper's four kinds, and open questions, by a teacher model.

    Attributes:
        kind: of the data.
        output: JSON Lines file of the rows; a run that was killed resumes there.
        teacher: openai:NAME behind a server, a saved model's folder or Hub id, or clinic.
        asks: how a saved model is asked: by instructions, or by bare questions where it only
            answers as a doctor; the clinic then writes the questions and plays the patient.
        num_rows: rows wanted; the last batch may give some more.
        batch_size: jobs that are taken together.
        seed: of all draws.
        languages: of instructions: zh, en, or both in balance.
        seeds: file of instructions to start from; None for those that are shipped.
        table: file of departments, roles and use cases; None for the one that is shipped.
        per_request: instructions that one request asks for.
        source: files of real dialogues, whose doctors' words are polished, or of exam questions,
            those of a published set as SET:FILE (cmexam:test.csv).
        cases: files of cases with their diagnoses, for conversations.
        max_exchanges: of a conversation.
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
        dry_run: tell the number of requests, tokens and cost; nothing is sent or computed.
    """

    kind: Kind
    output: str
    teacher: str = CLINIC
    asks: Style = "instructions"
    num_rows: int = 1_000
    batch_size: int = 16
    seed: int = 0
    languages: tuple[str, ...] = ("zh",)
    seeds: str | None = None
    table: str | None = None
    per_request: int = 4
    source: tuple[str, ...] = ()
    cases: tuple[str, ...] = ()
    max_exchanges: int = 8
    num_answers: int = 2
    near_duplicate: float = 0.7
    evaluation_sets: tuple[str, ...] = ()
    personal_data: PersonalData = "mask"
    base_url: Text | None = None
    max_cost: float | None = None
    max_requests: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    timeout_s: float = 120.0
    prices: str | None = None
    concurrency: int = 8
    temperature: float = 0.7
    max_new_tokens: int = 1_024
    template: str | None = None
    compute_dtype: str | None = None
    slots: int = 32
    dry_run: bool = False

    def __post_init__(self) -> None:
        """Validates the fields, and that they go together."""
        for name in (
            "num_rows",
            "batch_size",
            "per_request",
            "max_exchanges",
            "concurrency",
            "slots",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}={getattr(self, name)} must be at least 1")
        if self.num_answers < 0:
            raise ValueError(f"--num_answers={self.num_answers} must be at least 0")
        if self.seed < 0:
            raise ValueError(f"--seed={self.seed} must be at least 0")
        wrong = [one for one in self.languages if one not in LANGUAGES]
        if wrong or not self.languages or len(set(self.languages)) < len(self.languages):
            raise ValueError(f"--languages={','.join(self.languages)} should be zh, en or zh,en")
        if self.temperature < 0:
            raise ValueError(f"--temperature={self.temperature} must be at least 0")
        by_server = self.teacher.startswith(_SERVER_PREFIX)
        paid = ("base_url", "max_cost", "max_requests", "requests_per_minute", "tokens_per_minute")
        for name in () if by_server else paid:
            if getattr(self, name) is not None:
                raise ValueError(
                    f"--{name} is for a teacher named openai:NAME, and --teacher is {self.teacher}"
                )
        if self.asks == "questions" and (by_server or self.teacher == CLINIC):
            raise ValueError("--asks=questions is for a saved model, given by --teacher=DIR")
        if self.asks == "questions" and self.kind == "verifiable":
            raise ValueError("--kind=verifiable needs a teacher that follows instructions")
        if self.uses_clinic and self.languages != ("zh",):
            raise ValueError("--languages: the clinic writes Chinese alone")
        for name in ("seeds", "table"):
            if self.uses_clinic and getattr(self, name) is not None:
                raise ValueError(f"--{name} is not used where the clinic writes the questions")

    @property
    def uses_clinic(self) -> bool:
        """Returns True if the clinic writes the questions and plays the patient."""
        return self.teacher == CLINIC or self.asks == "questions"


def main(flags: Flags) -> None:
    """Makes the data, and says where rows and report are.

    Raises:
        ValueError: a file or flag is wrong, or the teacher cannot go on; what was made is written.
    """
    output = pathlib.Path(flags.output)
    checks = Checks(near_duplicate=flags.near_duplicate, personal_data=flags.personal_data)
    maker, known = MAKERS[flags.kind](flags)
    tests = EvaluationTexts(read_test_texts(flags.evaluation_sets), threshold=flags.near_duplicate)
    teacher, price = open_teacher(flags, output)
    if flags.dry_run:
        for line in plan(maker, teacher, num_rows=flags.num_rows):
            print(line)
        print("nothing was sent or computed; rows that are left out cost more requests")
        return
    runner = Runner(maker, teacher, output, checks=checks, known_prompts=known, tests=tests)
    outcome = runner.run(flags.num_rows)
    facts = RunFacts(
        kind=flags.kind,
        teacher=teacher.name,
        settings=dataclasses.asdict(flags),
        totals=teacher.totals(),
        price=price,
        num_known_prompts=len(known),
        num_tests=len(tests),
    )
    figures = write_report(outcome, facts, output)
    print(f"{figures['rows']} rows of {figures['candidates']} candidates: {output}")
    print(f"report: {output}.report.html, left out: {output}.rejected.jsonl")
    if outcome.ended is not None:
        tell(f"fewer rows than wanted: {outcome.ended}")
    if outcome.stopped is not None:
        raise ValueError(f"{outcome.stopped} (the rows that are done are in {output})")


def open_teacher(flags: Flags, output: pathlib.Path) -> tuple[Teacher, Price | None]:
    """Returns the teacher of the flags and the price of its tokens; nothing is sent yet.

    Raises:
        ValueError: no such model, no key, or a budget of money for a model without a price.
    """
    clinic = ClinicTeacher(seed=flags.seed)
    if flags.teacher == CLINIC:
        return clinic, None
    replies = pathlib.Path(f"{output}.replies")
    if flags.teacher.startswith(_SERVER_PREFIX):
        model = flags.teacher.removeprefix(_SERVER_PREFIX)
        spending = pathlib.Path(f"{output}.spending.jsonl")
        cfg = _chat_model(flags, model)
        price = read_price(model, flags.prices)
        if price is None and flags.max_cost is not None:
            raise ValueError(
                f"--max_cost={flags.max_cost:g} needs a price for {model!r}: add it to a copy of"
                " the price table and name the copy by --prices"
            )
        if not flags.dry_run:
            key_from_environment()
        respondent = ServerRespondent(cfg, spending=spending)
        return ModelTeacher(respondent, replies, spending=spending), price
    decoding = DecodingConfig(
        max_new_tokens=flags.max_new_tokens, temperature=flags.temperature, seed=flags.seed
    )
    saved = SavedRespondent(
        flags.teacher,
        decoding,
        template=flags.template,
        compute_dtype=flags.compute_dtype,
        slots=flags.slots,
    )
    plain = flags.asks == "questions"
    teacher = ModelTeacher(saved, replies, spending=None, plain=plain)
    return (SharedTeacher(teacher, clinic, seconds=_CLINIC_TASKS) if plain else teacher), None


def _chat_model(flags: Flags, model: str) -> ChatModelConfig:
    return ChatModelConfig(
        model=model,
        server=ServerConfig(
            base_url=flags.base_url or OPENAI_URL,
            budget=BudgetConfig(max_requests=flags.max_requests, max_cost=flags.max_cost),
            limits=RateLimits(requests=flags.requests_per_minute, tokens=flags.tokens_per_minute),
            timeout_s=flags.timeout_s,
        ),
        max_tokens=flags.max_new_tokens,
        temperature=flags.temperature,
        prices=flags.prices,
        concurrency=flags.concurrency,
    )


def _distilled_instruction(flags: Flags) -> tuple[Maker, dict[str, str]]:
    seeds = read_seeds(flags.seeds)
    maker = InstructionMaker(
        seeds=seeds,
        table=clinic_table() if flags.uses_clinic else read_table(flags.table),
        languages=flags.languages,
        seed=flags.seed,
        batch_size=flags.batch_size,
        per_request=flags.per_request,
    )
    return maker, {one.id: one.prompt for one in seeds}


def _distilled_conversation(flags: Flags) -> tuple[Maker, dict[str, str]]:
    if flags.languages != ("zh",):
        raise ValueError("--languages: conversations are made and checked in Chinese alone")
    if flags.uses_clinic:
        if flags.cases:
            raise ValueError("--cases is not used where the clinic plays the patient")
        cases = clinic_teaching_cases(_CLINIC_SPARE * flags.num_rows, seed=flags.seed)
    elif flags.cases:
        cases = read_teaching_cases(flags.cases)
    else:
        raise ValueError("distilled_conversation needs cases: give --cases=FILE")
    maker = ConversationMaker(
        cases=cases,
        max_exchanges=flags.max_exchanges,
        seed=flags.seed,
        batch_size=flags.batch_size,
    )
    return maker, {}


def _real(flags: Flags) -> tuple[Maker, dict[str, str]]:
    assert flags.kind in ("real_instruction", "real_conversation")
    if not flags.source:
        raise ValueError(f"{flags.kind} needs real dialogues: give --source=FILE")
    sources = read_sources(flags.source, flags.kind)
    for reason, count in sources.left_out.items():
        tell(f"source: {count} rows are {reason}, and left out")
    maker = PolishingMaker(
        kind=flags.kind,
        dialogues=sources.dialogues,
        plain=flags.asks == "questions",
        seed=flags.seed,
        batch_size=flags.batch_size,
    )
    return maker, {}


def _verifiable(flags: Flags) -> tuple[Maker, dict[str, str]]:
    if not flags.source:
        raise ValueError("verifiable needs exam questions: give --source=FILE")
    maker = VerifiableMaker(
        questions=read_exam_questions(flags.source),
        num_answers=flags.num_answers,
        seed=flags.seed,
        batch_size=flags.batch_size,
    )
    return maker, {}


MAKERS: Mapping[str, Callable[[Flags], tuple[Maker, dict[str, str]]]] = {
    "distilled_instruction": _distilled_instruction,
    "distilled_conversation": _distilled_conversation,
    "real_instruction": _real,
    "real_conversation": _real,
    "verifiable": _verifiable,
}
"""By kind, what reads its files and checks its flags: the maker, and the prompts known before."""
