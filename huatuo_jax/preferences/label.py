"""Labels an answers file: a judge's labels, a report of them, and preference pairs.

A killed run resumes from its labels file.
"""

import asyncio
import dataclasses
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from huatuo_jax.clinic.judge import ClinicJudge
from huatuo_jax.core.config import Text
from huatuo_jax.core.files import as_path, write_file
from huatuo_jax.core.progress import progress_bar
from huatuo_jax.judge.judgements import (
    Estimate,
    Judge,
    Judgement,
    JudgeUnusable,
    LabelsFile,
    read_judgements,
)
from huatuo_jax.judge.labelling import LabelConfig, Labels, Plan, label, make_plan, questions_of
from huatuo_jax.judge.offline import (
    EXACT,
    OFFLINE,
    OfflineJudge,
    OfflineName,
    open_offline,
    refuse_unused_judge,
)
from huatuo_jax.judge.openai import OpenAIJudge, OpenAIJudgeConfig
from huatuo_jax.judge.questions import Answered, Question, read_answered
from huatuo_jax.judge.replies import Structured
from huatuo_jax.judge.report import label_report
from huatuo_jax.judge.server import OPENAI_URL, ServerConfig, key_from_environment
from huatuo_jax.judge.spending import BudgetConfig, RateLimits, Totals
from huatuo_jax.preferences.from_judgements import (
    ComparisonConfig,
    MixedFile,
    make_comparisons,
    read_mixed,
    write_comparisons,
)
from huatuo_jax.training.loop import INTERRUPTED_EXIT_CODE, Interrupted, StopSignals

Say = Callable[[str], object]


@dataclass(frozen=True, kw_only=True)
class LabelRun:
    """The answers to label, the judge, and the output.

    Attributes:
        answers: the answers file.
        encoding: of its text; None detects it, see `huatuo_jax.data.files`.
        output: the labels file, new or resumed.
        openai: the judge behind a server; None for an offline one.
        offline: the offline judge: the `rubric`, or the `clinic`'s own truth, for its prompts only.
        clinic_judge: the fields of the clinic's judge, above all planted biases.
        label: the questions about each prompt.
        spending: spending file, which several labels files may share, as they do their budget;
            None for one beside the output.
        dry_run: count calls and cost, and send nothing.
        comparisons: the file of preference pairs to write; None for none.
        comparison: how judgements become preference pairs.
    """

    answers: str
    output: str
    encoding: str | None = None
    openai: OpenAIJudgeConfig | None = None
    offline: OfflineName = "rubric"
    clinic_judge: ClinicJudge = EXACT
    label: LabelConfig = LabelConfig()
    spending: str | None = None
    dry_run: bool = False
    comparisons: str | None = None
    comparison: ComparisonConfig = ComparisonConfig()

    def __post_init__(self) -> None:
        """Validates that the files differ and that no field is unused."""
        files = [self.answers, self.output, *([self.comparisons] if self.comparisons else [])]
        if len({as_path(path).resolve() for path in files}) < len(files):
            raise ValueError(f"answers, output and comparisons are {files}; they should differ")
        for name, path in (("output", self.output), ("comparisons", self.comparisons)):
            if path is not None and (not path or as_path(path).is_dir()):
                raise ValueError(f"{name}={path!r} is not the name of a file to write")
        if self.comparisons is not None and self.label.protocol == "both":
            raise ValueError(
                "comparisons are made of one protocol: label with protocol=both, then run again"
                " with score or pairwise, which costs nothing more"
            )
        refuse_unused_judge(
            self.clinic_judge, offline=self.offline, by_server=self.openai is not None
        )


def run_labels(cfg: LabelRun, say: Say) -> Labels | None:
    """Labels an answers file; run again, it resumes.

    Writes its report (`.report.json`) and, where a server was asked, its spending file beside the
    labels file.

    Args:
        cfg: the answers, the judge and the output.
        say: called with lines for the user.

    Returns:
        The labels; None after a dry run.

    Raises:
        ValueError: invalid answers, templates, prices or labels file; a judge that failed; no
            verdict on any question. All judgements that had arrived are in the labels file.
        Interrupted: SIGTERM or Ctrl-C came; replies under way were waited for and are kept.
        OSError: a file cannot be read or written.
    """
    answered = read_answered(cfg.answers, encoding=cfg.encoding)
    if cfg.comparisons is not None:  # Files to mix in are checked before anything is paid for.
        read_mixed(cfg.comparison.mix, num_own=0, seed=cfg.comparison.seed)
    judge = open_judge(cfg)
    try:
        questions = questions_of(cfg.label, answered, judge)
        if not questions:
            raise ValueError(
                f"{cfg.answers}: nothing to judge: protocol=score needs an answer to a prompt,"
                " pairwise two different ones"
            )
        with LabelsFile(cfg.output) as file:
            plan = make_plan(questions, file.found, judge)
        for line in _told_before(cfg, plan, answered, judge):
            say(line)
    except BaseException:
        asyncio.run(judge.close())
        raise
    if cfg.dry_run:
        asyncio.run(judge.close())
        return None
    with progress_bar("judging", "judgements") as on_progress, StopSignals() as signals:
        labels = label(
            questions,
            judge,
            cfg.output,
            concurrency=cfg.label.concurrency,
            on_progress=on_progress,
            stop=lambda: signals.noted,
        )
    if labels.judgements:
        say(str(labels))
        if isinstance(judge, OpenAIJudge):
            say(judge.spent())
    if labels.error is not None:
        raise labels.error
    if labels.stopped:
        raise Interrupted(
            f"stopped with {labels.missing} of {len(questions)} judgements to ask for; the others "
            f"are in {cfg.output}: run the same command again to resume"
        )
    if labels.judgements:
        _report(cfg, answered, questions, judge, say)
        say(f"written: {cfg.output}, {report_path(cfg.output)}")
        _check_verdicts(cfg, labels)
        _compare(cfg, answered, labels.judgements, say)
    return labels


def open_judge(cfg: LabelRun) -> Judge:
    """Opens the judge of a run; its key is from the environment.

    Raises:
        ValueError: an invalid template, price table or spending file, no key, or a budget of money
            for a model without a price.
    """
    if cfg.openai is None:
        return open_offline(cfg.offline, cfg.clinic_judge)
    if cfg.dry_run:  # It sends nothing, and needs no key.
        key = "none"
    else:
        try:
            key = key_from_environment()
        except JudgeUnusable as error:
            raise JudgeUnusable(
                f"{error}; judge={cfg.openai.model!r} is asked for at {cfg.openai.server.base_url},"
                f" only judge={' and '.join(OFFLINE)} need no server"
            ) from error
    return OpenAIJudge(cfg.openai, key=key, spending=cfg.spending or spending_path(cfg.output))


def spending_path(output: str | os.PathLike[str]) -> str:
    """Returns the path of a labels file's spending file."""
    return f"{os.fspath(output)}.spending.jsonl"


def report_path(output: str | os.PathLike[str]) -> str:
    """Returns the path of a labels file's report."""
    return f"{os.fspath(output)}.report.json"


def _told_before(
    cfg: LabelRun, plan: Plan, answered: Sequence[Answered], judge: Judge
) -> Iterator[str]:
    """Yields the plan, the prices, and what may end the run early."""
    yield str(plan)
    if isinstance(judge, OpenAIJudge):
        assert cfg.openai is not None
        if judge.price is not None:
            yield str(judge.price)
        yield from _budget_lacks(cfg.openai.server.budget, plan.estimate, judge.totals)
    elif isinstance(judge, OfflineJudge):
        num_bare = sum(not (one.prompt.reference or one.prompt.diagnosis) for one in answered)
        if num_bare:
            yield (
                f"{num_bare} of {len(answered)} prompts have neither reference nor diagnosis:"
                f" {judge.name} measures only the form of their answers"
            )
    if cfg.dry_run:
        yield "dry run: nothing was sent or written"


def _budget_lacks(budget: BudgetConfig, estimate: Estimate, totals: Totals) -> Iterator[str]:
    """Yields where the budget will end before the plan does."""
    if budget.max_requests is not None:
        left = max(0, budget.max_requests - totals.requests)
        if left < estimate.calls:
            yield (
                f"max_requests={budget.max_requests} leaves {left} of {estimate.calls} calls: the"
                " run will end there"
            )
    if budget.max_cost is not None and estimate.cost is not None:
        money = max(0.0, budget.max_cost - totals.cost - totals.unknown_cost)
        if money < estimate.cost:
            yield (
                f"max_cost={budget.max_cost:g} leaves {money:.6g} of about {estimate.cost:.6g}: the"
                " run may end early"
            )


def _next_step(cfg: LabelRun) -> str:
    if cfg.comparisons is not None:
        return f"huatuo train --config=reward:SFT_MODEL_DIR,{cfg.comparisons} --workdir=RUN_DIR"
    protocol = "" if cfg.label.protocol != "both" else " --protocol=score (or pairwise)"
    return f"the same command with{protocol} --comparisons=FILE; nothing is asked twice"


def _report(
    cfg: LabelRun,
    answered: Sequence[Answered],
    questions: Sequence[Question],
    judge: Judge,
    say: Say,
) -> None:
    """Reports all lines of these questions; the file may hold those of other settings too."""
    keys = {question.key for question in questions}
    lines = (line for line in read_judgements(cfg.output) if line.key in keys)
    report = label_report(lines, answered, criterion=cfg.comparison.criterion)
    row = report.to_json()
    if isinstance(judge, OpenAIJudge):
        row["spending"] = dataclasses.asdict(judge.totals)
        row["prices"] = None if judge.price is None else judge.price.to_json()
    path = as_path(report_path(cfg.output))
    write_file(path, json.dumps(row, ensure_ascii=False, indent=2))
    say(report.text())


def _check_verdicts(cfg: LabelRun, labels: Labels) -> None:
    """Raises ValueError if every judgement failed."""
    if labels.verdicts:
        return
    ((error, count),) = Counter(one.error for one in labels.judgements).most_common(1)
    raise ValueError(
        f"no judgement succeeded: all {len(labels.judgements)} failed, {count} of them so: {error}"
        f" (they stay in {cfg.output})"
    )


def _compare(
    cfg: LabelRun, answered: Sequence[Answered], judgements: Sequence[Judgement], say: Say
) -> None:
    if cfg.comparisons is None:
        return
    comparisons, report = make_comparisons(judgements, answered, cfg.comparison)
    if not comparisons:
        raise ValueError(
            f"these judgements give no comparison, so {cfg.comparisons} is not written"
            f" (the labels stay in {cfg.output}): {report.text()}"
        )
    write_comparisons(cfg.comparisons, comparisons)
    say(f"{report.text()}\nwritten: {cfg.comparisons}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """Labels an answers file by a judge, and makes comparisons; run again, it resumes.

    The key is read from OPENAI_API_KEY.

    Attributes:
        answers: answers file.
        output: labels file to make, or to go on with.
        judge: `offline`, `clinic`, or a model behind `base_url`.
        encoding: of the answers' text; None decides by evidence.
        dry_run: count calls and cost, and send nothing.
        comparisons: comparisons file to make of the labels.
        label: what to ask about each prompt.
        base_url: the judge's server, with its `/v1`.
        budget: what all runs of the output may take together.
        requests_per_minute: what the server allows.
        tokens_per_minute: what the server allows.
        timeout_s: of a call.
        max_attempts: calls for a question where the server fails.
        score_template: template file; None for the shipped one.
        pairwise_template: template file; None for the shipped one.
        require_reference: refuse prompts with neither a doctor's answer nor a diagnosis.
        prices: price table; None for the shipped example, which nobody has checked.
        structured: what the server can hold a reply to.
        log_probs: a pair's probability from the verdict's token.
        temperature: None, or below 0, leaves it to the server.
        max_tokens: of a reply.
        max_tokens_field: what the server calls it.
        low: the worst score.
        high: the best score.
        criterion: the score that decides.
        score_scale: soft labels of sigmoid(difference of scores / score_scale); None for 0 and 1.
        tie_margin: scores that differ by no more are a tie.
        ties: leave them out, or keep them as 0.5.
        disagreement: of the two orders: keep it as 0.5, or leave it out.
        max_pairs_per_prompt: comparisons of a prompt at most.
        max_length_ratio: longer wins over shorter wins; 1 for equal, None for no balance.
        max_source_ratio: largest source over smallest; 1 for equal, None for no balance.
        max_turns_ratio: the same for numbers of turns.
        mix: other comparisons files to mix in.
        seed: of all random choices among comparisons.
    """

    answers: str
    output: str
    judge: str = "offline"
    encoding: str | None = None
    dry_run: bool = False
    comparisons: str | None = None
    label: LabelConfig = LabelConfig()
    base_url: Text = OPENAI_URL
    budget: BudgetConfig = BudgetConfig()
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    timeout_s: float = 120.0
    max_attempts: int = 6
    score_template: str | None = None
    pairwise_template: str | None = None
    require_reference: bool = True
    prices: str | None = None
    structured: Structured = "json_schema"
    log_probs: bool = False
    temperature: float | None = 0.0
    max_tokens: int = 1024
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    low: int = 1
    high: int = 5
    criterion: str = "overall"
    score_scale: float | None = None
    tie_margin: float = 0.0
    ties: Literal["drop", "half"] = "drop"
    disagreement: Literal["half", "drop"] = "half"
    max_pairs_per_prompt: int | None = None
    max_length_ratio: float | None = None
    max_source_ratio: float | None = None
    max_turns_ratio: float | None = None
    mix: tuple[str, ...] = ()
    seed: int = 0


def main(flags: Flags) -> None:
    """Labels, and prints the results."""
    cfg = run_of(flags)
    try:
        labels = run_labels(cfg, print)
    except Interrupted as stopped:
        print(f"label: {stopped}", flush=True)
        raise SystemExit(INTERRUPTED_EXIT_CODE) from None
    if labels is not None and labels.judgements:  # In a recipe, the next stage follows by itself.
        print(f"next: {_next_step(cfg)}")


def run_of(flags: Flags) -> LabelRun:
    """Returns the run that the flags describe; a flag without effect is refused.

    Raises:
        ValueError: a flag cannot have its value.
    """
    judge = flags.judge
    if not judge:
        names = ", ".join(f"`{name}`" for name in OFFLINE)
        raise ValueError(f"judge is empty; it should be {names} or a model of the server")
    if judge in OFFLINE:
        _refuse(flags, _OF_A_SERVER, f"judge={judge}; give --judge=MODEL, or")
    if flags.comparisons is None:
        _refuse(flags, _OF_COMPARISONS, "labels alone; give --comparisons=FILE too, or")
    return LabelRun(
        answers=flags.answers,
        output=flags.output,
        encoding=flags.encoding,
        dry_run=flags.dry_run,
        comparisons=flags.comparisons,
        label=flags.label,
        comparison=ComparisonConfig(
            **_values(flags, ("criterion", *_OF_COMPARISONS)) | {"mix": _mixed(flags)}
        ),
        openai=None if judge in OFFLINE else _openai(flags),
        offline=OFFLINE.get(judge, "rubric"),
    )


_OF_SERVER = ("base_url", "timeout_s", "max_attempts")
_OF_OPENAI = (
    "score_template",
    "pairwise_template",
    "require_reference",
    "prices",
    "structured",
    "log_probs",
    "temperature",
    "max_tokens",
    "max_tokens_field",
    "low",
    "high",
)
_OF_LIMITS = ("budget", "requests_per_minute", "tokens_per_minute")
_OF_A_SERVER = (*_OF_SERVER, *_OF_LIMITS, *_OF_OPENAI)
_OF_COMPARISONS = (
    "score_scale",
    "tie_margin",
    "ties",
    "disagreement",
    "max_pairs_per_prompt",
    "max_length_ratio",
    "max_source_ratio",
    "max_turns_ratio",
    "mix",
    "seed",
)


def _openai(flags: Flags) -> OpenAIJudgeConfig:
    temperature = flags.temperature
    if temperature is not None and temperature < 0:
        temperature = None
    server = ServerConfig(
        **_values(flags, _OF_SERVER),
        budget=flags.budget,
        limits=RateLimits(requests=flags.requests_per_minute, tokens=flags.tokens_per_minute),
    )
    values = _values(flags, _OF_OPENAI) | {"temperature": temperature}
    return OpenAIJudgeConfig(**values, model=flags.judge, server=server)


def _mixed(flags: Flags) -> tuple[MixedFile, ...]:
    return tuple(MixedFile(path=path) for path in flags.mix)


def _values(flags: Flags, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(flags, name) for name in names}


def _refuse(flags: Any, names: tuple[str, ...], what: str) -> None:
    """Raises ValueError for a flag that is set without effect."""
    for field in dataclasses.fields(flags):
        value = getattr(flags, field.name)
        if field.name in names and value != field.default:
            if dataclasses.is_dataclass(value):  # Its fields are flags without its name.
                _refuse(value, tuple(one.name for one in dataclasses.fields(value)), what)
            raise ValueError(f"--{field.name} is ignored by {what} leave it out")
