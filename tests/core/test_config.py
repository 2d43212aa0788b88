"""Configs: fields replaced by their paths, types checked, cards read."""

import dataclasses
from typing import Literal

import pytest

from huatuo_jax.core import config
from huatuo_jax.core.config import Text, checked, load_card, placed_in, replaced


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Inner:
    size: int
    mode: Literal["a", "b"] = "a"

    def __post_init__(self):
        if isinstance(self.size, int) and self.size < 1:
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
    judge: Literal["auto"] | Literal["rubric", "clinic"] = "auto"


def test_fields_are_replaced_by_their_paths():
    changes = {"rate": 1.0, "inner.size": 3, "inner.mode": "b", "extra": _Inner(size=2)}
    assert replaced(_Outer(), changes) == _Outer(
        rate=1.0, inner=_Inner(size=3, mode="b"), extra=_Inner(size=2)
    )
    with pytest.raises(ValueError, match="_Inner has no field 'siz'; it has ..size', 'mode"):
        replaced(_Outer(), {"inner.siz": 3})
    with pytest.raises(ValueError, match="extra=None has no field size"):
        replaced(_Outer(), {"extra.size": 3})
    with pytest.raises(ValueError, match="size=0 must be at least 1"):
        replaced(_Outer(), {"inner.size": 0})


def test_the_runs_folder_stands_wherever_its_mark_did():
    parts = (_Inner(size=1),)
    assert placed_in(_Outer(name="{workdir}/a", parts=parts), "w") == _Outer(
        name="w/a", parts=parts
    )


def test_a_config_whose_fields_have_their_types_is_returned_as_it_is():
    settings = _Outer(rate=1, steps=3, parts=(_Inner(size=5),), judge="clinic")
    assert checked(settings, _Outer, path="config") is settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (_Inner(size=1), "^config=.* must be a _Outer$"),
        ({"rate": 1.0}, "^config=.* must be a _Outer$"),
        (_Outer(inner=_Inner(size="3")), "^config.inner.size=.3. must be of type int$"),
        (_Outer(inner=_Inner(size=True)), "^config.inner.size=True must be of type int$"),
        (_Outer(inner=_Inner(size=1, mode="c")), "^config.inner.mode=.c. must be one of ..a', 'b"),
        (_Outer(parts=(_Inner(size=1), _Inner(size="2"))), r"^config.parts\[1\].size=.2. must be"),
        (_Outer(parts=[_Inner(size=1)]), "^config.parts=.* must be a tuple of of type _Inner$"),
        (_Outer(parts="abc"), "^config.parts=.abc. must be a tuple of"),
        (_Outer(inner=3), "^config.inner=3 must be of type _Inner$"),
        (_Outer(steps=1.5), "^config.steps=1.5 must be of type int or None$"),
        (_Outer(is_on=1), "^config.is_on=1 must be of type bool$"),
        (_Outer(judge="x"), "^config.judge=.x. must be one of ..auto'. or one of ..rubric', 'cl"),
    ],
)
def test_a_field_of_another_type_is_named_with_what_would_be_right(settings, message):
    with pytest.raises(ValueError, match=message):
        checked(settings, _Outer, path="config")


def write(folder, text):
    (folder / "mine.py").write_text(text, encoding="utf-8")
    return str(folder / "mine.py")


def test_a_card_is_a_file_or_the_name_of_one_of_ours():
    assert load_card("rlaif") == load_card("configs/rlaif.py")
    assert load_card("sft:mine.jsonl").sft.data.sources[0].paths == ("mine.jsonl",)


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("import nowhere", "", "mine.py: ModuleNotFoundError: No module named 'nowhere'"),
        ("def get_config(:", "", "mine.py: SyntaxError"),
        ("x = 1", "", r"mine.py: no get_config\(\) in it"),
        ("def get_config(): return {}", "", r"get_config\(\) returns a dict, not a dataclass"),
        ("def get_config(): return 1", ":x", "takes no arguments after the colon, and 'x' is"),
        ("def get_config(a): raise ValueError('b=0')", ":x", "mine.py: b=0"),
        ("def get_config(a): return a", "", "mine.py: get_config.* missing 1 required"),
    ],
)
def test_a_card_that_cannot_be_read_is_one_clear_message(tmp_path, text, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_card(write(tmp_path, text) + arguments)


def test_a_card_that_is_not_there_is_named_with_those_that_are(tmp_path):
    with pytest.raises(ValueError, match="--config=nowhere.py: no such file"):
        load_card("nowhere.py")
    with pytest.raises(ValueError, match="--config=rlaf must be a file .* rlaif, sft"):
        load_card("rlaf")
    assert (config._cards_folder() / "rlaif.py").is_file()


@dataclasses.dataclass(frozen=True)
class Paths:
    model: str = "models/base"
    files: tuple[str, ...] = ()
    base_url: Text | None = None
    stop_strings: tuple[Text, ...] = ()


@dataclasses.dataclass(frozen=True)
class Run:
    paths: Paths = Paths()
    several: tuple[Paths, ...] = ()


@pytest.mark.parametrize(
    ("run", "field"),
    [
        (Run(Paths(model="gs://nowhere/model")), r"config\.paths\.model: gs://nowhere/model"),
        (Run(Paths(files=("a", "gs://nowhere/b"))), r"config\.paths\.files: gs://nowhere/b"),
        (Run(several=(Paths(model="gs://nowhere/m"),)), r"config\.several\.model: gs://nowhere/m"),
    ],
)
def test_an_address_in_the_place_of_a_path_is_looked_for_and_its_field_named(run, field, bucket):
    with pytest.raises(ValueError, match=f"{field}: there is no such bucket"):
        checked(run, Run, path="config")


def test_addresses_on_the_web_are_taken_where_a_field_is_text():
    run = Run(Paths(base_url="http://127.0.0.1:8000/v1", stop_strings=("http://",)))
    assert checked(run, Run, path="config") is run


@pytest.mark.parametrize("path", ["runs/demo", "/runs/a:b", "C:/runs", "cmexam:/data/test.csv"])
def test_paths_with_colons_are_no_addresses(path):
    assert checked(Run(Paths(model=path)), Run, path="config").paths.model == path
