"""Have the answers of a file judged, and make comparisons; run again after a kill, it resumes."""

import dataclasses
from typing import Any, Literal

from huatuo_jax.feedback.budget import BudgetConfig
from huatuo_jax.feedback.comparison_config import ComparisonConfig, MixedFile
from huatuo_jax.feedback.label_command import LabelRun, run_labels
from huatuo_jax.feedback.labelling import LabelConfig
from huatuo_jax.feedback.openai_judge import OpenAIJudgeConfig
from huatuo_jax.feedback.rate_limits import RateLimits
from huatuo_jax.feedback.replies import Structured
from huatuo_jax.feedback.server_calls import OPENAI_URL, ServerConfig
from huatuo_jax.feedback.truth_judge import OFFLINE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """Have the answers of a file judged, and make comparisons; run again, it resumes.

    The key is taken from OPENAI_API_KEY.

    Attributes:
        answers: answers file.
        output: labels file to make, or to go on with.
        judge: `offline`, `clinic`, or a model behind `base_url`.
        encoding: of the answers' text; None decides by evidence.
        dry_run: count calls and cost, and send nothing.
        comparisons: comparisons file to make of the labels.
        protocol: `score` for each answer by itself, `pairwise` for every two in both orders.
        max_pairs: pairs of a prompt to judge at most.
        concurrency: questions under way at once.
        base_url: the judge's server, with its `/v1`.
        max_requests: calls that all runs of the output may make.
        max_cost: money that all runs of the output may spend.
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
    protocol: Literal["score", "pairwise", "both"] = "score"
    max_pairs: int | None = None
    concurrency: int = 8
    base_url: str = OPENAI_URL
    max_requests: int | None = None
    max_cost: float | None = None
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
    """Label, and print how it went."""
    run_labels(run_of(flags), print)


def run_of(flags: Flags) -> LabelRun:
    """The run that the flags describe; a flag that would do nothing is refused.

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
        label=LabelConfig(**_values(flags, _OF_LABELS)),
        comparison=ComparisonConfig(
            **_values(flags, ("criterion", *_OF_COMPARISONS)) | {"mix": _mixed(flags)}
        ),
        openai=None if judge in OFFLINE else _openai(flags),
        offline=OFFLINE.get(judge, "rubric"),
    )


_OF_LABELS = ("protocol", "max_pairs", "concurrency")
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
_OF_LIMITS = ("max_requests", "max_cost", "requests_per_minute", "tokens_per_minute")
_OF_A_SERVER = (*_OF_SERVER, *_OF_LIMITS, *_OF_OPENAI)
_OF_COMPARISONS = (
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
        budget=BudgetConfig(max_requests=flags.max_requests, max_cost=flags.max_cost),
        limits=RateLimits(requests=flags.requests_per_minute, tokens=flags.tokens_per_minute),
    )
    values = _values(flags, _OF_OPENAI) | {"temperature": temperature}
    return OpenAIJudgeConfig(**values, model=flags.judge, server=server)


def _mixed(flags: Flags) -> tuple[MixedFile, ...]:
    return tuple(MixedFile(path=path) for path in flags.mix)


def _values(flags: Flags, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(flags, name) for name in names}


def _refuse(flags: Flags, names: tuple[str, ...], what: str) -> None:
    """Raise ValueError for a flag that is set and would do nothing."""
    for field in dataclasses.fields(flags):
        if field.name in names and getattr(flags, field.name) != field.default:
            raise ValueError(f"--{field.name} is ignored by {what} leave it out")
