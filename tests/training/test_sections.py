"""Config sections to dataclasses and back: what is accepted, and what the errors say."""

import dataclasses
from typing import Literal

import pytest
from ml_collections import ConfigDict

from huatuo_jax.training.sections import from_section, to_section


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Inner:
    size: int
    mode: Literal["a", "b"] = "a"

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"size={self.size} must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Outer:
    rate: float = 0.5
    steps: int | None = None
    inner: _Inner = _Inner(size=1)
    extra: _Inner | None = None
    parts: tuple[_Inner, ...] = ()
    is_on: bool = False
    name: str = "x"


def test_nested_sections_become_nested_dataclasses():
    section = ConfigDict({"rate": 1, "inner": {"size": 3}, "parts": ({"size": 4, "mode": "b"},)})
    built = from_section(_Outer, section, path="config")
    assert built == _Outer(rate=1.0, inner=_Inner(size=3), parts=(_Inner(size=4, mode="b"),))
    assert isinstance(built.rate, float)


def test_a_dataclass_survives_the_way_there_and_back():
    settings = _Outer(steps=3, inner=_Inner(size=2), parts=(_Inner(size=5),))
    assert from_section(_Outer, to_section(settings), path="config") == settings
    assert from_section(_Outer, to_section(_Outer()), path="config") == _Outer()


def test_a_field_that_is_none_can_be_overridden_in_its_type():
    section = to_section(_Outer())
    section.steps = 7
    assert from_section(_Outer, section, path="config").steps == 7
    with pytest.raises(TypeError):
        section.steps = "many"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"rat": 1.0}, "config has no field rat; it has extra, inner, is_on, name, parts, rate"),
        ({"inner": {}}, "config.inner lacks size"),
        ({"inner": {"size": "3"}}, "config.inner.size='3' must be of type int"),
        ({"inner": {"size": True}}, "config.inner.size=True must be of type int"),
        ({"inner": {"size": 1, "mode": "c"}}, r"config.inner.mode='c' must be one of \['a', 'b'\]"),
        ({"inner": {"size": 0}}, "config.inner: size=0 must be at least 1"),
        ({"parts": [{"size": 1}, {"siz": 1}]}, r"config.parts\[1\] has no field siz"),
        ({"parts": "abc"}, "config.parts='abc' must be a list"),
        ({"inner": 3}, "config.inner=3 must be a section"),
        ({"steps": 1.5}, "config.steps=1.5 must be of type int"),
        ({"is_on": 1}, "config.is_on=1 must be of type bool"),
    ],
)
def test_a_wrong_field_is_named_with_what_would_be_right(section, message):
    with pytest.raises(ValueError, match=message):
        from_section(_Outer, section, path="config")


def test_of_several_types_all_that_is_right_is_told_in_words():
    @dataclasses.dataclass(frozen=True)
    class Choosing:
        judge: Literal["auto"] | Literal["rubric", "clinic"] = "auto"
        limit: int | Literal["none"] = 1

    assert from_section(Choosing, {"judge": "clinic"}, path="config").judge == "clinic"
    with pytest.raises(
        ValueError, match=r"^config.judge='x' must be one of \['auto', 'rubric', 'c"
    ):
        from_section(Choosing, {"judge": "x"}, path="config")
    with pytest.raises(ValueError, match=r"^config.limit=1.5 must be int or one of \['none'\]$"):
        from_section(Choosing, {"limit": 1.5}, path="config")
