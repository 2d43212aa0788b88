"""Requests to the engine, its answers and report, stop strings, and the host's table of slots."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import transformers
from jax.sharding import Mesh

from huatuo_jax.core import sharding
from huatuo_jax.core.config import Text
from huatuo_jax.data.answers import text_of
from huatuo_jax.generation.buckets import bucket_of
from huatuo_jax.generation.programs import Emitted, Progress
from huatuo_jax.generation.sampling import MAX_TOP_LOG_PROBS, Settings, TopTokens
from huatuo_jax.generation.streaming import GrowingText

FinishReason = Literal["stop", "length"]
TopLogProbs = list[tuple[int, float]]  # Tokens with their log-probabilities, best first.

_SEEDS = 1 << 32
MAX_STOP_TOKENS = 16  # A fixed width, so that no request causes a recompilation.


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """The sampling of an answer, and its end.

    Attributes:
        max_new_tokens: tokens of an answer at most; the engine's `max_length` limits it too.
        min_new_tokens: no stop token or stop string ends an answer before this many tokens.
        temperature: logits are divided by it; 0 takes the best token.
        top_k: only the k best tokens; 0 for all.
        top_p: only the best tokens that together have this probability (nucleus sampling, arXiv
            1904.09751); 1 for all.
        min_p: only tokens with at least this share of the best one's probability (arXiv
            2407.01082); 0 for all.
        repetition_penalty: divides positive and multiplies negative logits of tokens of the prompt
            or answer (arXiv 1909.05858); 1 for none.
        stop_token_ids: tokens that end an answer; they are the last of its ids and not in its text.
        stop_strings: texts that end an answer; its ids include the token that completes the text,
            its text ends before it. They need an engine with a tokenizer.
    """

    max_new_tokens: int = 512
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[Text, ...] = ()

    def __post_init__(self) -> None:
        """Validates the fields."""
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
        prompt_token_ids: the tokens before the answer.
        sampling: the sampling of the answers.
        seed: 0 to 2^32 - 1; the same request with the same seed has the same answers, whatever else
            the engine does.
        num_answers: number G of answers; they differ by their index.
        num_top_log_probs: the number of best tokens to return at every place, 0 to 20.
    """

    prompt_token_ids: Sequence[int]
    sampling: SamplingConfig = SamplingConfig()
    seed: int = 0
    num_answers: int = 1
    num_top_log_probs: int = 0

    def __post_init__(self) -> None:
        """Validates the fields."""
        if not len(self.prompt_token_ids):
            raise ValueError("Request.prompt_token_ids is empty; a prompt needs at least one token")
        if not 0 <= self.seed < _SEEDS:
            raise ValueError(f"Request.seed={self.seed} must lie between 0 and 2^32 - 1")
        if self.num_answers < 1:
            raise ValueError(f"Request.num_answers={self.num_answers} must be at least 1")
        if not 0 <= self.num_top_log_probs <= MAX_TOP_LOG_PROBS:
            raise ValueError(
                f"Request.num_top_log_probs={self.num_top_log_probs} must lie between 0 and "
                f"{MAX_TOP_LOG_PROBS}"
            )


@dataclasses.dataclass(frozen=True)
class Usage:
    """Tokens of a request and its answer."""

    prompt_tokens: int
    completion_tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer.

    Attributes:
        request_index: index of its request, from 0 in the order given.
        answer_index: index among that request's answers.
        token_ids: as sampled, a stop token included.
        text: of the ids, without a stop token or stop string; None without a tokenizer.
        log_probs: of each token under the softmax of logits / temperature, nothing filtered or
            penalised (temperature 1 for greedy answers).
        sampling_log_probs: of each token under the distribution it was drawn from.
        finish_reason: `stop` for a stop token or string, `length` for a limit.
        usage: its tokens; answers of one request share its prompt.
        top_log_probs: for each token the best tokens there and their log-probabilities, best first,
            under the distribution of `log_probs`; as many as the request asked for.
    """

    request_index: int
    answer_index: int
    token_ids: list[int]
    text: str | None
    log_probs: list[float]
    sampling_log_probs: list[float]
    finish_reason: FinishReason
    usage: Usage
    top_log_probs: list[TopLogProbs] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineReport:
    """Counts since the engine was made, or since its `reset_report`.

    Attributes:
        prompt_tokens: tokens run through the model; once for all answers of a request.
        cached_prompt_tokens: further tokens of prompts, which the prefix cache held.
        generated_tokens: tokens sampled, those after a stop string included.
        seconds: time of the engine's rounds, compilation included.
        rounds: calls of the decode program.
        queued_slot_steps: slots times decode steps, while answers were waiting for a slot.
        queued_busy_slot_steps: those of them that gave a token.
        pages_in_use: pages of the cache that answers have now.
        compilations: programs compiled, by kind, since the engine was made; those that an engine of
            the same model and settings had compiled before are not compiled again.
        max_compilations: largest possible number of them, whatever the requests.
    """

    prompt_tokens: int
    cached_prompt_tokens: int
    generated_tokens: int
    seconds: float
    rounds: int
    queued_slot_steps: int
    queued_busy_slot_steps: int
    pages_in_use: int
    compilations: Mapping[str, int]
    max_compilations: int

    @property
    def occupancy(self) -> float:
        """Returns the share of slots busy until the queue was empty; 1 if nothing ever waited."""
        if not self.queued_slot_steps:
            return 1.0
        return self.queued_busy_slot_steps / self.queued_slot_steps

    @property
    def tokens_per_s(self) -> float:
        """Returns generated tokens per second."""
        return self.generated_tokens / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        """Returns the report in one line."""
        return (
            f"{self.generated_tokens} tokens in {self.seconds:.1f} s "
            f"({self.tokens_per_s:.1f} tokens/s), slots {self.occupancy:.0%} busy while requests "
            f"waited, {sum(self.compilations.values())} of at most {self.max_compilations} "
            "programs compiled"
        )


class Cut(NamedTuple):
    """An answer that a stop string ends: its ids, and its text before that string."""

    num_tokens: int
    text: str


def find_stop(
    growing: GrowingText,
    token_ids: Sequence[int],
    stop_strings: Sequence[str],
    *,
    first: int,
) -> Cut | None:
    """Returns where the first stop string is complete, or None.

    Args:
        growing: the text of this answer, which decodes it.
        token_ids: of an answer.
        stop_strings: texts that end it.
        first: the smallest length in tokens at which it may end; earlier stop strings are ignored.
    """
    # A character with missing bytes decodes to U+FFFD, and may still change.
    passed = len(growing.of(token_ids[: first - 1]).rstrip("\ufffd"))

    def start(text: str) -> int | None:
        found = [text.find(stop, max(0, passed - len(stop) + 1)) for stop in stop_strings]
        return min((place for place in found if place >= 0), default=None)

    if start(growing.of(token_ids)) is None:
        return None
    for num_tokens in range(first, len(token_ids) + 1):
        text = growing.of(token_ids[:num_tokens])
        place = start(text)
        if place is not None:
            return Cut(num_tokens, text[:place])
    return None


def slots_for(wanted: int, mesh: Mesh | None) -> int:
    """Returns the smallest number of slots from `wanted` on that a mesh divides evenly."""
    shards = sharding.batch_shards(mesh)
    return -(-wanted // shards) * shards


@dataclasses.dataclass
class Running:
    """An unfinished answer.

    Attributes:
        request_index: index of its request, in the order given.
        request: the request itself.
        answer_index: index among the request's answers.
        token_ids: so far.
        log_probs: of each, see `Answer`.
        sampling_log_probs: of each, see `Answer`.
        top_log_probs: of each, see `Answer`.
        num_checked: tokens already searched for stop strings.
        text: of the tokens, where stop strings are searched for.
    """

    request_index: int
    request: Request
    answer_index: int
    token_ids: list[int] = dataclasses.field(default_factory=list)
    log_probs: list[float] = dataclasses.field(default_factory=list)
    sampling_log_probs: list[float] = dataclasses.field(default_factory=list)
    top_log_probs: list[TopLogProbs] = dataclasses.field(default_factory=list)
    num_checked: int = 0
    text: GrowingText | None = None


def finished(
    running: Running, *, active: bool, tokenizer: transformers.PreTrainedTokenizerBase | None
) -> Answer | None:
    """Returns the answer if it is complete by a stop string, a stop token or its length.

    Args:
        running: the tokens so far; the search for stop strings records its progress there.
        active: the device would continue it.
        tokenizer: the model's; without one the answer has no text.
    """
    sampling, ids = running.request.sampling, running.token_ids
    if sampling.stop_strings:
        assert tokenizer is not None
        first = max(running.num_checked + 1, sampling.min_new_tokens, 1)
        if running.text is None:
            running.text = GrowingText(tokenizer)
        cut = find_stop(running.text, ids, sampling.stop_strings, first=first)
        if cut is not None:
            return _answer(running, num_tokens=cut.num_tokens, text=cut.text, reason="stop")
        running.num_checked = len(ids)
        running.text.settled(ids)
    if active:
        return None
    stopped = ids[-1] in sampling.stop_token_ids
    text = None
    if tokenizer is not None:
        text = text_of(tokenizer, ids[:-1] if stopped else ids)
    reason: FinishReason = "stop" if stopped else "length"
    return _answer(running, num_tokens=len(ids), text=text, reason=reason)


def _answer(running: Running, *, num_tokens: int, text: str | None, reason: FinishReason) -> Answer:
    prompt_tokens = len(running.request.prompt_token_ids)
    return Answer(
        request_index=running.request_index,
        answer_index=running.answer_index,
        token_ids=running.token_ids[:num_tokens],
        text=text,
        log_probs=running.log_probs[:num_tokens],
        sampling_log_probs=running.sampling_log_probs[:num_tokens],
        finish_reason=reason,
        usage=Usage(prompt_tokens, num_tokens),
        top_log_probs=running.top_log_probs[:num_tokens],
    )


class SlotTable:
    """A fixed number of slots.

    Attributes:
        running: the answer in each slot, None where it is free.
        progress: host arrays, as arguments of the programs.
        settings: likewise.
    """

    def __init__(self, num_slots: int) -> None:
        """Makes free slots."""

        def filled(value: int | float, dtype: type, *more: int) -> np.ndarray:
            return np.full((num_slots, *more), value, dtype=dtype)

        self.running: list[Running | None] = [None] * num_slots
        self.progress = Progress(
            filled(0, np.int32), filled(0, np.int32), filled(0, np.int32), filled(False, np.bool_)
        )
        self.settings = Settings(
            temperature_B=filled(0.0, np.float32),
            top_k_B=filled(0, np.int32),
            top_p_B=filled(1.0, np.float32),
            min_p_B=filled(0.0, np.float32),
            repetition_penalty_B=filled(1.0, np.float32),
            min_new_tokens_B=filled(0, np.int32),
            max_new_tokens_B=filled(1, np.int32),
            stop_token_ids_BE=filled(-1, np.int32, MAX_STOP_TOKENS),
            seed_B=filled(0, np.uint32),
            answer_B=filled(0, np.int32),
            num_top_log_probs_B=filled(0, np.int32),
        )

    @property
    def free(self) -> list[int]:
        """Returns the slots without an answer."""
        return [slot for slot, running in enumerate(self.running) if running is None]

    @property
    def lengths_B(self) -> np.ndarray:
        """Returns each slot's number of cached positions, 0 for a free one."""
        return np.where(self.progress.active_B, self.progress.positions_B, 0)

    @property
    def wants_top(self) -> bool:
        """Returns True if any answer wants the best tokens."""
        return bool((self.progress.active_B & (self.settings.num_top_log_probs_B > 0)).any())

    def occupy(self, slot: int, running: Running) -> None:
        """Puts a new answer into a slot; the cache holds all but the prompt's last token.

        The first decode step runs that token, so that all sampling is in one program.
        """
        prompt, sampling = running.request.prompt_token_ids, running.request.sampling
        self.running[slot] = running
        self._set_progress(slot, token=prompt[-1], position=len(prompt) - 1, active=True)
        settings = self.settings
        settings.temperature_B[slot] = sampling.temperature
        settings.top_k_B[slot] = min(sampling.top_k, np.iinfo(np.int32).max)
        settings.top_p_B[slot] = sampling.top_p
        settings.min_p_B[slot] = sampling.min_p
        settings.repetition_penalty_B[slot] = sampling.repetition_penalty
        settings.min_new_tokens_B[slot] = sampling.min_new_tokens
        settings.max_new_tokens_B[slot] = sampling.max_new_tokens
        settings.stop_token_ids_BE[slot] = -1
        settings.stop_token_ids_BE[slot, : len(sampling.stop_token_ids)] = sampling.stop_token_ids
        settings.seed_B[slot] = running.request.seed
        settings.answer_B[slot] = running.answer_index
        settings.num_top_log_probs_B[slot] = running.request.num_top_log_probs

    def free_slot(self, slot: int) -> None:
        """Removes the answer from a slot, which idles at position 0."""
        self.running[slot] = None
        self._set_progress(slot, token=0, position=0, active=False)

    def rows_to_decode(self, sizes: tuple[int, ...], *, shards: int) -> np.ndarray:
        """Returns the slots with answers, filled up with idle ones to one of the sizes.

        They are equally many of each shard, one shard after another, in rising order in a shard.

        Args:
            sizes: numbers of slots, rising; the last is all of them.
            shards: batch shards of the mesh.
        """
        active_XB = self.progress.active_B.reshape(shards, -1)
        size = bucket_of(int(active_XB.sum(axis=1).max()) * shards, sizes) // shards
        # A stable order: active ones first.
        first_XR = np.argsort(~active_XB, axis=1, kind="stable")[:, :size]
        return (np.sort(first_XR) + active_XB.shape[1] * np.arange(shards)[:, None]).reshape(-1)

    def of_rows(self, rows_R: np.ndarray) -> tuple[Progress, Settings]:
        """Returns progress and settings of some slots."""
        progress = Progress(*(array[rows_R] for array in self.progress))
        return progress, Settings(*(array[rows_R] for array in self.settings))

    def take(self, rows_R: np.ndarray, progress: Progress, emitted: Emitted) -> int:
        """Records the results of decode steps of some slots; returns the number of tokens."""
        for own, new in zip(self.progress, progress, strict=True):
            own[rows_R] = np.asarray(new)
        tokens_NR, log_probs_NR, sampling_NR = (np.asarray(array) for array in emitted[:3])
        for column, slot in enumerate(rows_R):
            running = self.running[slot]
            if running is None:
                continue
            steps = np.flatnonzero(tokens_NR[:, column] >= 0)
            running.token_ids += tokens_NR[steps, column].tolist()
            running.log_probs += log_probs_NR[steps, column].tolist()
            running.sampling_log_probs += sampling_NR[steps, column].tolist()
            running.top_log_probs += [
                _top_log_probs(emitted.top, int(step), column, running.request.num_top_log_probs)
                for step in steps
            ]
        return int((tokens_NR >= 0).sum())

    def _set_progress(self, slot: int, *, token: int, position: int, active: bool) -> None:
        progress = self.progress
        progress.tokens_B[slot], progress.positions_B[slot] = token, position
        progress.generated_B[slot], progress.active_B[slot] = 0, active


def _top_log_probs(top: TopTokens | None, step: int, column: int, count: int) -> TopLogProbs:
    """Returns the first tokens of a slot in a step; none where the device gave none."""
    if top is None or not count:
        return []
    ids_K, log_probs_K = top.token_ids[step, column], top.log_probs[step, column]
    return list(zip(ids_K[:count].tolist(), log_probs_K[:count].tolist(), strict=True))
