"""The numbers of a metrics file, compared with those of another run."""

import pytest

from huatuo_jax.training.metrics import is_time_field, read_rows


def numbers(path):
    """All numbers but those of the clock, by step and name."""
    return {
        (row["step"], field): value
        for row in read_rows(path)
        for field, value in row.items()
        if field != "step" and not is_time_field(field) and not isinstance(value, str)
    }


def assert_same(path, other, *, at_least):
    """The same rows and names, and numbers that differ by no more than rounding."""
    found, expected = numbers(path), numbers(other)
    assert found.keys() == expected.keys() and len(found) > at_least
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key
