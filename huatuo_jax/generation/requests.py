"""What the engine is asked for, and what it answers."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

FinishReason = Literal["stop", "length"]

_SEEDS = 1 << 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How an answer is sampled and where it ends.

    Attributes:
        max_new_tokens: tokens of an answer at most; the engine's `max_length` bounds it too.
        min_new_tokens: no stop token or stop string ends an answer before so many tokens.
        temperature: logits are divided by it; 0 takes the best token.
        top_k: only the k best tokens; 0 for all.
        top_p: only the best tokens that together hold this probability (nucleus sampling, arXiv
            1904.09751); 1 for all.
        min_p: only tokens with at least this share of the best one's probability (arXiv
            2407.01082); 0 for all.
        repetition_penalty: divides positive and multiplies negative logits of tokens that stand in
            prompt or answer (arXiv 1909.05858); 1 for none.
        stop_token_ids: tokens that end an answer; they are the last of its ids and not in its text.
        stop_strings: texts that end an answer; its ids go on to the token that completes the
            text, its text ends before it. They need the engine to have a tokenizer.
    """

    max_new_tokens: int = 512
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raise ValueError for a field that cannot be."""
        self._require("max_new_tokens", self.max_new_tokens >= 1, "at least 1")
        self._require("min_new_tokens", self.min_new_tokens >= 0, "at least 0")
        self._require(
            "min_new_tokens",
            self.min_new_tokens <= self.max_new_tokens,
            f"at most max_new_tokens={self.max_new_tokens}",
        )
        finite = math.isfinite(self.temperature)
        self._require("temperature", finite and self.temperature >= 0, "0 (greedy) or above")
        self._require("top_k", self.top_k >= 0, "0 (all tokens) or above")
        self._require("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (all tokens)")
        self._require("min_p", 0 <= self.min_p <= 1, "between 0 (all tokens) and 1")
        finite = math.isfinite(self.repetition_penalty)
        self._require("repetition_penalty", finite and self.repetition_penalty > 0, "above 0")
        self._require("stop_strings", "" not in self.stop_strings, "without an empty text")

    def _require(self, name: str, holds: bool, right: str) -> None:
        if not holds:
            raise ValueError(f"SamplingConfig.{name}={getattr(self, name)!r} must be {right}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to answer.

    Attributes:
        prompt_token_ids: what the answer follows.
        sampling: how.
        seed: of its randomness, 0 to 2^32 - 1: the same request with the same seed has the same
            answers, whatever else the engine does.
        num_answers: answers wanted, G; they differ by their index.
    """

    prompt_token_ids: Sequence[int]
    sampling: SamplingConfig = SamplingConfig()
    seed: int = 0
    num_answers: int = 1

    def __post_init__(self) -> None:
        """Raise ValueError for a field that cannot be."""
        if not len(self.prompt_token_ids):
            raise ValueError("Request.prompt_token_ids is empty; a prompt needs at least one token")
        if not 0 <= self.seed < _SEEDS:
            raise ValueError(f"Request.seed={self.seed} must lie between 0 and 2^32 - 1")
        if self.num_answers < 1:
            raise ValueError(f"Request.num_answers={self.num_answers} must be at least 1")


@dataclasses.dataclass(frozen=True)
class Usage:
    """Tokens that a request cost."""

    prompt_tokens: int
    completion_tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer.

    Attributes:
        request_index: which of the requests it answers, counted from 0 in the order given.
        answer_index: which of that request's answers it is.
        token_ids: as sampled, a stop token included.
        text: of the ids, without a stop token or stop string; None without a tokenizer.
        log_probs: of each token under the softmax of logits / temperature, nothing filtered or
            penalised (temperature 1 for greedy answers).
        sampling_log_probs: of each token under the distribution it was drawn from.
        finish_reason: `stop` for a stop token or string, `length` for a limit.
        usage: what it cost; answers of one request share its prompt.
    """

    request_index: int
    answer_index: int
    token_ids: list[int]
    text: str | None
    log_probs: list[float]
    sampling_log_probs: list[float]
    finish_reason: FinishReason
    usage: Usage
