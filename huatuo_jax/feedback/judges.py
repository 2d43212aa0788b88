"""What every judge is: something that scores an answer, or says which of two is the better one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
import typing
from typing import Any

from huatuo_jax.data.records import Prompt
from huatuo_jax.feedback import judgements


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A judge's verdict and what it took.

    Attributes:
        scores: to `score`: a number for each of `judgements.CRITERIA`.
        p_first: to `compare`: the probability that the first answer is the better one.
        reason: why, in the judge's words.
        raw: the reply as it came.
        usage: tokens, as the server counted them.
        cost: money; None where there is no price.
        latency_s: of the last call.
    """

    scores: Mapping[str, float] | None = None
    p_first: float | None = None
    reason: str | None = None
    raw: str | None = None
    usage: Mapping[str, Any] | None = None
    cost: float | None = None
    latency_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a question may take.

    Attributes:
        calls: requests to a server, where none fails.
        input_tokens: about so many.
        max_input_tokens: no more than these.
        max_output_tokens: no more than these.
        cost: with `input_tokens` and all output tokens; None where there is no price.
        max_cost: with `max_input_tokens`; None where there is no price.
    """

    calls: int
    input_tokens: int
    max_input_tokens: int
    max_output_tokens: int
    cost: float | None
    max_cost: float | None


NOTHING = Estimate(
    calls=0, input_tokens=0, max_input_tokens=0, max_output_tokens=0, cost=0.0, max_cost=0.0
)


class JudgementFailed(Exception):
    """This question has no verdict this time; another may have one, and a later try of this too."""

    def __init__(
        self,
        message: str,
        *,
        raw: str | None = None,
        usage: Mapping[str, Any] | None = None,
        cost: float | None = None,
        latency_s: float | None = None,
        failure: judgements.Failure = "unreadable",
        max_tokens: int | None = None,
        ends_after: int | None = None,
    ) -> None:
        """Say why, and what it took all the same.

        Args:
            message: why.
            raw: the reply as it came.
            usage: tokens, as the server counted them.
            cost: money.
            latency_s: of the last call.
            failure: the kind.
            max_tokens: that the reply was allowed, where it is truncated.
            ends_after: this may be what every question meets, as the judge has answered none yet:
                so many questions of that kind, and the judge is of no use. None where the question
                alone is the matter.
        """
        super().__init__(judgements.printable(message))
        self.raw, self.usage, self.cost, self.latency_s = raw, usage, cost, latency_s
        self.failure, self.max_tokens, self.ends_after = failure, max_tokens, ends_after


class JudgeUnusable(ValueError):
    """No question can be answered: a wrong key, an unknown model, a spent budget."""


class Judge(typing.Protocol):
    """Scores answers and compares them."""

    @property
    def name(self) -> str:
        """The name that stands in every record."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """Plain values that decide the verdicts, for the key of a question; never a secret."""

    def template_hash(self, protocol: judgements.Protocol) -> str:
        """Hash of the prompt template, or of what stands for it, as it is in every record."""

    def estimate(self, prompt: Prompt, texts: Sequence[str]) -> Estimate:
        """What a question about one text (a score) or two (a comparison) may take.

        Raises:
            ValueError: this prompt cannot be judged.
        """

    async def score(self, prompt: Prompt, answer: str) -> Reply:
        """The answer's scores.

        Raises:
            JudgementFailed: there is no verdict.
            JudgeUnusable: there will be none to any question.
        """

    async def compare(self, prompt: Prompt, first: str, second: str) -> Reply:
        """How likely the first answer is the better one.

        Raises:
            JudgementFailed: there is no verdict.
            JudgeUnusable: there will be none to any question.
        """

    async def close(self) -> None:
        """Let go of connections and files."""
