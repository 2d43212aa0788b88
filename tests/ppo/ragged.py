"""A rollout of invented numbers, ragged and with rows that hold nothing."""

import dataclasses

import numpy as np

LENGTHS = (3, 1, 0, 6, 4, 2)
NUM_SLOTS = 6
STOP_TOKENS = (0, 7)


@dataclasses.dataclass
class Rollout:
    """Arrays `[B, T]` and `[B]` in float64, `starts_B` slots before each answer."""

    lengths_B: np.ndarray
    starts_B: np.ndarray
    mask_BT: np.ndarray
    tokens_BT: np.ndarray
    log_probs_BT: np.ndarray
    old_BT: np.ndarray
    reference_BT: np.ndarray
    values_BT: np.ndarray
    old_values_BT: np.ndarray
    rewards_BT: np.ndarray
    advantages_BT: np.ndarray
    entropies_BT: np.ndarray
    scores_B: np.ndarray

    def places(self):
        """(row, slots of its answer) for each row, by hand."""
        for row, (start, length) in enumerate(zip(self.starts_B, self.lengths_B, strict=True)):
            yield row, range(start, start + length)

    def with_junk(self, junk):
        """The same with `junk` in every slot and row that holds no answer."""
        changed = {}
        for field in dataclasses.fields(self):
            array = getattr(self, field.name)
            if array.dtype == np.float64:
                hole = ~self.mask_BT if array.ndim == 2 else self.lengths_B == 0
                changed[field.name] = np.where(hole, junk, array)
        changed["tokens_BT"] = np.where(self.mask_BT, self.tokens_BT, STOP_TOKENS[0])
        return dataclasses.replace(self, **changed)


def make_rollout(seed=0, *, lengths=LENGTHS, num_slots=NUM_SLOTS, starts=None):
    draw = np.random.default_rng(seed)
    lengths_B = np.array(lengths)
    starts_B = np.zeros_like(lengths_B) if starts is None else np.array(starts)
    slots_BT = np.broadcast_to(np.arange(num_slots), (len(lengths), num_slots))
    mask_BT = (slots_BT >= starts_B[:, None]) & (slots_BT < (starts_B + lengths_B)[:, None])

    def numbers(scale=1.0):
        return draw.normal(size=mask_BT.shape) * scale

    old_BT, values_BT = -np.exp(numbers()), numbers()
    return Rollout(
        lengths_B=lengths_B,
        starts_B=starts_B,
        mask_BT=mask_BT,
        tokens_BT=draw.integers(0, 5, mask_BT.shape),
        log_probs_BT=old_BT + numbers(0.3),
        old_BT=old_BT,
        reference_BT=old_BT + numbers(0.5),
        values_BT=values_BT,
        old_values_BT=values_BT + numbers(0.3),
        rewards_BT=numbers(),
        advantages_BT=numbers(),
        entropies_BT=np.abs(numbers()),
        scores_B=draw.normal(size=len(lengths)),
    )
