"""The host's side of the slots: who is in which, and what the programs are told of them."""

import dataclasses

import numpy as np
from jax.sharding import Mesh

from huatuo_jax import sharding
from huatuo_jax.generation.buckets import bucket_of
from huatuo_jax.generation.programs import Emitted, Progress
from huatuo_jax.generation.requests import Request
from huatuo_jax.generation.sampling import Settings

MAX_STOP_TOKENS = 16  # A fixed width, so that no request compiles anything anew.


def slots_for(wanted: int, mesh: Mesh | None) -> int:
    """The fewest slots, at least so many, that a mesh divides evenly."""
    shards = sharding.batch_shards(mesh)
    return -(-wanted // shards) * shards


@dataclasses.dataclass
class Running:
    """An answer on its way.

    Attributes:
        request_index: its request, counted in the order given.
        request: the request itself.
        answer_index: which of the request's answers.
        token_ids: so far.
        log_probs: of each, see `Answer`.
        sampling_log_probs: of each, see `Answer`.
        num_checked: tokens already searched for stop strings.
    """

    request_index: int
    request: Request
    answer_index: int
    token_ids: list[int] = dataclasses.field(default_factory=list)
    log_probs: list[float] = dataclasses.field(default_factory=list)
    sampling_log_probs: list[float] = dataclasses.field(default_factory=list)
    num_checked: int = 0


class SlotTable:
    """A fixed number of slots.

    Attributes:
        running: the answer in each slot, None where it is free.
        progress: arrays of the host, as the programs take them.
        settings: likewise.
    """

    def __init__(self, num_slots: int) -> None:
        """Make free slots."""

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
        )

    @property
    def free(self) -> list[int]:
        """The slots without an answer."""
        return [slot for slot, running in enumerate(self.running) if running is None]

    @property
    def lengths_B(self) -> np.ndarray:
        """Positions that each slot has behind it; a free one has none."""
        return np.where(self.progress.active_B, self.progress.positions_B, 0)

    def occupy(self, slot: int, running: Running) -> None:
        """Put an answer at its start into a slot; the cache holds all but the prompt's last token.

        That token is the first that a decode step runs, so that all sampling is in one place.
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

    def free_slot(self, slot: int) -> None:
        """Take the answer out of a slot; it idles at position 0."""
        self.running[slot] = None
        self._set_progress(slot, token=0, position=0, active=False)

    def rows_to_decode(self, sizes: tuple[int, ...], *, shards: int) -> np.ndarray:
        """The slots that hold answers, filled up with idle ones to one of the sizes.

        As many of each shard, one shard after another; in a shard in rising order.

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
        """Progress and settings of some slots."""
        progress = Progress(*(array[rows_R] for array in self.progress))
        return progress, Settings(*(array[rows_R] for array in self.settings))

    def take(self, rows_R: np.ndarray, progress: Progress, emitted: Emitted) -> int:
        """Note what some decode steps of some slots gave; returns the number of tokens."""
        for own, new in zip(self.progress, progress, strict=True):
            own[rows_R] = np.asarray(new)
        tokens_NR, log_probs_NR, sampling_NR = (np.asarray(array) for array in emitted)
        for column, slot in enumerate(rows_R):
            running = self.running[slot]
            if running is None:
                continue
            steps = np.flatnonzero(tokens_NR[:, column] >= 0)
            running.token_ids += tokens_NR[steps, column].tolist()
            running.log_probs += log_probs_NR[steps, column].tolist()
            running.sampling_log_probs += sampling_NR[steps, column].tolist()
        return int((tokens_NR >= 0).sum())

    def _set_progress(self, slot: int, *, token: int, position: int, active: bool) -> None:
        progress = self.progress
        progress.tokens_B[slot], progress.positions_B[slot] = token, position
        progress.generated_B[slot], progress.active_B[slot] = 0, active
