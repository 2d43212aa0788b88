"""Tests share a jitted function only between functions that make the same program."""

import dataclasses
import functools
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import optax
import pytest

import huatuo_jax
from huatuo_jax.backbone.transformer import Transformer
from huatuo_jax.generation.engine import Engine
from huatuo_jax.preferences import label
from tests import shared_programs, tiny


@dataclasses.dataclass(frozen=True)
class Scale:
    by: float

    def __call__(self, x):
        return self.by * x


def scaled(by):
    return lambda x: by * x


def test_functions_of_equal_code_and_values_are_traced_once():
    traced = []

    def make(by):
        def scale(x):
            traced.append(by)
            return by * x

        return jax.jit(scale)

    assert make(2.0) is make(2.0)
    assert make(2.0)(3.0) == make(2.0)(3.0) == 6.0
    assert make(3.0)(3.0) == 9.0
    assert traced == [2.0, 3.0]


def optimizer(steps):
    return optax.adamw(optax.linear_schedule(1e-3, 0.0, steps)).update


@pytest.mark.parametrize(
    ("one", "other", "are_shared"),
    [
        (scaled(1.0), scaled(1.0), True),
        (scaled(1.0), scaled(1), False),  # Another type of the product.
        (scaled(0.0), scaled(-0.0), False),
        (functools.partial(jnp.sum, axis=0), functools.partial(jnp.sum, axis=0), True),
        (functools.partial(jnp.sum, axis=0), functools.partial(jnp.sum, axis=1), False),
        (Scale(2.0).__call__, Scale(2.0).__call__, True),
        (Scale(2.0).__call__, Scale(3.0).__call__, False),
        (scaled(by=[1.0]), scaled(by=[1.0]), False),  # A list may change.
        (optimizer(10), optimizer(10), True),
        (optimizer(10), optimizer(11), False),
        (Transformer(tiny.backbone()).apply, Transformer(tiny.backbone()).apply, True),
    ],
)
def test_keys_are_equal_where_programs_are(one, other, are_shared):
    assert (shared_programs.key_of(one) == shared_programs.key_of(other)) == are_shared


def test_options_make_another_function():
    function = scaled(5.0)
    assert jax.jit(function) is not jax.jit(function, donate_argnums=0)
    first, second = (jax.NamedSharding(tiny.one_device(), jax.P(*axes)) for axes in [(), ("data",)])
    assert jax.jit(function, out_shardings=first) is jax.jit(function, out_shardings=first)
    assert jax.jit(function, out_shardings=first) is not jax.jit(function, out_shardings=second)


def test_what_is_patched_is_not_shared_with_what_is_not():
    def make():
        return jax.jit(lambda x: jnp.negative(x))

    before = make()
    assert before(1.0) == -1.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jnp, "negative", lambda x: x)
        assert make() is not before
        assert make()(1.0) == 1.0
        patch.undo()
        patch.setattr(jnp, "negative", lambda x: 2 * x)
        assert make()(1.0) == 2.0
    assert make() is before


def test_what_no_program_is_traced_from_is_patched_under_shared_programs():
    def make():
        return jax.jit(lambda x: x + 3.0)

    before = make()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(label, "open_judge", None)
        patch.setattr(Engine, "step", None)
        patch.setattr("huatuo_jax.data.batches.BatchIterator", None)
        patch.setattr(sys, "argv", [])
        assert make() is before
        patch.setattr(jnp, "negative", None)
        assert make() is not before
    assert make() is before


def test_what_no_program_is_traced_from_computes_nothing_in_jax():
    root = pathlib.Path(huatuo_jax.__file__).parents[1]
    own = [name for name in shared_programs.NOT_TRACED if re.fullmatch(r"huatuo_jax\..*\.", name)]
    assert len(own) > 10
    for place in (root / name[:-1].replace(".", "/") for name in own):
        files = [*place.rglob("*.py")] or [place.with_suffix(".py")]
        for file in files:
            assert not re.search(r"\bjnp\b|jax\.(jit|lax)", file.read_text(encoding="utf-8")), file
