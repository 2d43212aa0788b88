"""The flags of `launch/label.py`, by the part of the run that they are fields of."""

from collections.abc import Iterable
from typing import Any

from absl import flags

from huatuo_jax.feedback.budget import BudgetConfig
from huatuo_jax.feedback.comparison_config import ComparisonConfig, MixedFile
from huatuo_jax.feedback.label_command import OFFLINE, LabelRun
from huatuo_jax.feedback.labelling import LabelConfig
from huatuo_jax.feedback.openai_judge import OpenAIJudgeConfig
from huatuo_jax.feedback.rate_limits import RateLimits
from huatuo_jax.feedback.server_calls import OPENAI_URL, ServerConfig

# With it `launch/label.py --help` shows these as the command's own flags.
flags.disclaim_key_flags()

_NAMES = ", ".join(f"`{name}`" for name in OFFLINE)
Group = tuple[flags.FlagHolder[Any], ...]


class LabelFlags:
    """Defines the flags when it is made, and reads them when they are parsed."""

    def __init__(self) -> None:
        """Define the flags; once in a process."""
        self._run, self._label = _run_flags(), _label_flags()
        self._server, self._openai = _server_flags(), _openai_flags()
        self._comparison = _comparison_flags()
        flags.mark_flags_as_required(["answers", "output"])

    def read(self) -> LabelRun:
        """The run that the flags name; a flag that would do nothing is refused.

        Raises:
            ValueError: a flag cannot have its value.
        """
        run = _values(self._run)
        judge = run.pop("judge")
        if not judge:
            raise ValueError(f"judge is empty; it should be {_NAMES} or a model of the server")
        if judge in OFFLINE:
            _refuse((*self._server, *self._openai), f"judge={judge}; give --judge=MODEL, or")
        if run["comparisons"] is None:
            _refuse(
                [flag for flag in self._comparison if flag.name != "criterion"],
                "labels alone; give --comparisons=FILE too, or",
            )
        comparison = _values(self._comparison)
        mix = tuple(MixedFile(path=path) for path in comparison.pop("mix"))
        return LabelRun(
            **run,
            label=LabelConfig(**_values(self._label)),
            comparison=ComparisonConfig(**comparison, mix=mix),
            openai=None if judge in OFFLINE else self._openai_config(judge),
            offline=OFFLINE[judge] if judge in OFFLINE else "rubric",
        )

    def _openai_config(self, model: str) -> OpenAIJudgeConfig:
        openai = _values(self._openai)
        temperature = openai.pop("temperature")
        return OpenAIJudgeConfig(
            **openai,
            model=model,
            temperature=temperature if temperature >= 0 else None,
            server=_server_config(_values(self._server)),
        )


def _server_config(server: dict[str, Any]) -> ServerConfig:
    limits = RateLimits(
        requests=server.pop("requests_per_minute"), tokens=server.pop("tokens_per_minute")
    )
    budget = BudgetConfig(max_requests=server.pop("max_requests"), max_cost=server.pop("max_cost"))
    return ServerConfig(**server, budget=budget, limits=limits)


def _refuse(group: Iterable[flags.FlagHolder[Any]], what: str) -> None:
    """Raise ValueError for a flag that was given and would do nothing."""
    for flag in group:
        if flags.FLAGS[flag.name].present:
            raise ValueError(f"--{flag.name} is ignored by {what} leave it out")


def _values(group: Group) -> dict[str, Any]:
    return {flag.name: flag.value for flag in group}


def _run_flags() -> Group:
    return (
        flags.DEFINE_string("answers", None, "Answers file."),
        flags.DEFINE_string("encoding", None, "Of the answers' text; default: told by evidence."),
        flags.DEFINE_string("output", None, "Labels file to make, or to go on with."),
        flags.DEFINE_string("judge", "offline", f"{_NAMES}, or a model behind `--base_url`."),
        flags.DEFINE_bool("dry_run", False, "Count calls and cost, and send nothing."),
        flags.DEFINE_string("comparisons", None, "Comparisons file to make of the labels."),
    )


def _label_flags() -> Group:
    return (
        flags.DEFINE_enum("protocol", "score", ["score", "pairwise", "both"], "What is asked."),
        flags.DEFINE_integer("max_pairs", None, "Pairs of a prompt to judge at most."),
        flags.DEFINE_integer("concurrency", 8, "Questions under way at once."),
    )


def _server_flags() -> Group:
    return (
        flags.DEFINE_string("base_url", OPENAI_URL, "The judge's server, with its `/v1`."),
        flags.DEFINE_integer("max_requests", None, "Calls that all runs of the output may make."),
        flags.DEFINE_float("max_cost", None, "Money that all runs of the output may spend."),
        flags.DEFINE_integer("requests_per_minute", None, "What the server allows."),
        flags.DEFINE_integer("tokens_per_minute", None, "What the server allows."),
        flags.DEFINE_float("timeout_s", 120.0, "Of a call."),
        flags.DEFINE_integer("max_attempts", 6, "Calls for a question where the server fails."),
    )


def _openai_flags() -> Group:
    shipped = "default: the shipped one."
    return (
        flags.DEFINE_string("score_template", None, f"Template file; {shipped}"),
        flags.DEFINE_string("pairwise_template", None, f"Template file; {shipped}"),
        flags.DEFINE_bool("require_reference", True, "Refuse prompts without a doctor's word."),
        flags.DEFINE_string(
            "prices", None, "Your price table; default: a shipped example, unchecked."
        ),
        flags.DEFINE_string("structured", "json_schema", "Or `json_object`, or `none`."),
        flags.DEFINE_bool("log_probs", False, "A pair's probability from the verdict's token."),
        flags.DEFINE_float("temperature", 0.0, "Below 0 leaves it to the server."),
        flags.DEFINE_integer("max_tokens", 1024, "Of a reply."),
        flags.DEFINE_string("max_tokens_field", "max_tokens", "Or `max_completion_tokens`."),
        flags.DEFINE_integer("low", 1, "The worst score."),
        flags.DEFINE_integer("high", 5, "The best score."),
    )


def _comparison_flags() -> Group:
    balance = "; 1 for equal, default: no balance."
    return (
        flags.DEFINE_string("criterion", "overall", "The score that decides."),
        flags.DEFINE_float("tie_margin", 0.0, "Scores that differ by no more are a tie."),
        flags.DEFINE_enum("ties", "drop", ["drop", "half"], "Leave out, or keep as 0.5."),
        flags.DEFINE_enum("disagreement", "half", ["half", "drop"], "Of the two orders."),
        flags.DEFINE_integer("max_pairs_per_prompt", None, "Comparisons of a prompt at most."),
        flags.DEFINE_float("max_length_ratio", None, f"Longer wins over shorter wins{balance}"),
        flags.DEFINE_float("max_source_ratio", None, f"Largest source over smallest{balance}"),
        flags.DEFINE_float("max_turns_ratio", None, f"The same for numbers of turns{balance}"),
        flags.DEFINE_multi_string("mix", [], "Other comparisons to mix in; may be repeated."),
        flags.DEFINE_integer("seed", 0, "Of all random choices among comparisons."),
    )
