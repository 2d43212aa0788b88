"""A made-up memory of the devices, between what two micro-batches take: what tests share."""

from huatuo_jax.training.micro_batch import MARGIN
from huatuo_jax.training.programs import GIB, MEMORY_VARIABLE, memory_of


def peak(programs):
    """Bytes that the largest of some programs holds on a device, as its compiler counts them."""
    return max(
        memory_of(one.compile(), beside=one.beside, capacity=0).total for one in list(programs)
    )


def make_up(monkeypatch, *, programs_of, fits, too_large):
    """Sets a memory that holds the programs of one micro-batch and not those of a larger one."""
    low, high = peak(programs_of(fits)), peak(programs_of(too_large))
    assert low < high
    monkeypatch.setenv(MEMORY_VARIABLE, repr((low + high) / 2 / (1 - MARGIN) / GIB))


def told(stage, *, size, rows):
    """How the line about a choice begins."""
    return f"{stage}: micro_batch_size=auto: {size} of {rows} rows at once; {stage}/"
