"""Config dataclasses: loads cards, replaces and checks fields, and compares saved configs.

A card is a Python file with `get_config()`, which may take one string, and returns a dataclass.
Fields marked `operational` may change between restarts; all others are a run's identity.
"""

import dataclasses
import importlib.metadata
import importlib.util
import inspect
import json
import os
import pathlib
import sys
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar, cast, get_args, get_origin

import typeguard

from huatuo_jax.core.files import check_address

_ABSENT = object()
Config = TypeVar("Config")
WORKDIR_MARK = "{workdir}"
"""Stands for the run's folder in a config's path, such as that of an earlier stage's output."""

_OPERATIONAL = "operational"
_NO_PATH = "no path"

Text = Annotated[str, _NO_PATH]
"""The type of a field that may hold `http://...`: an address on the web, or words. A field that is
a plain `str` may be a path, and addresses are refused there."""


def as_json(value: Any, *, name: str) -> Any:
    """Returns a value as it will be read back from JSON: tuples as lists, keys as strings.

    Raises:
        ValueError: something in it has no JSON form.
    """
    try:
        return json.loads(json.dumps(_plain(value)))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: must be made of JSON values, {error}") from error


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Lists where two nested configs differ, as `mlp.hidden: saved 11008, now 14336`.

    Both are compared in their JSON form, so a tuple equals a list; an integer equals the same
    float, but not a boolean. Fields that only one of them has are listed as `absent` in the other.
    The lines are sorted by the field's path.
    """
    found: list[tuple[str, str]] = []
    _compare(as_json(saved, name="saved"), as_json(current, name="current"), "", found)
    return [f"{path}: {text}" for path, text in sorted(found)]


def _compare(saved: Any, current: Any, path: str, found: list[tuple[str, str]]) -> None:
    if isinstance(saved, dict) and isinstance(current, dict):
        for key in saved.keys() | current.keys():
            below = f"{path}.{key}" if path else key
            _compare(saved.get(key, _ABSENT), current.get(key, _ABSENT), below, found)
    elif _lists_of_records(saved, current):
        for index, (before, now) in enumerate(zip(saved, current, strict=True)):
            _compare(before, now, f"{path}[{index}]", found)
    elif not _same(saved, current):
        found.append((path, f"saved {_text(saved)}, now {_text(current)}"))


def _lists_of_records(saved: Any, current: Any) -> bool:
    """Tells whether two lists are to be compared element by element."""
    return (
        isinstance(saved, list)
        and isinstance(current, list)
        and len(saved) == len(current)
        and any(isinstance(element, dict) for element in saved + current)
    )


def _same(saved: Any, current: Any) -> bool:
    if isinstance(saved, list) and isinstance(current, list):
        return len(saved) == len(current) and all(map(_same, saved, current))
    if isinstance(saved, bool) != isinstance(current, bool):
        return False
    both_nan = saved != saved and current != current
    return both_nan or bool(saved == current)


def _text(value: Any) -> str:
    return "absent" if value is _ABSENT else json.dumps(value, ensure_ascii=False)


def _plain(value: Any) -> Any:
    """Turns all mappings into dicts, for JSON."""
    if isinstance(value, Mapping):
        return {str(key): _plain(below) for key, below in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(below) for below in value]
    return value


def placed_in(settings: Config, workdir: str | os.PathLike[str]) -> Config:
    """Returns a config with the run's folder in place of `WORKDIR_MARK`, in all of its sections."""
    folder = os.fspath(workdir)

    def placed(value: Any) -> Any:
        if isinstance(value, str):
            return value.replace(WORKDIR_MARK, folder)
        if isinstance(value, tuple):
            return tuple(map(placed, value))
        if is_config(value):
            names = [field.name for field in dataclasses.fields(value) if field.init]
            return dataclasses.replace(
                value, **{name: placed(getattr(value, name)) for name in names}
            )
        return value

    return cast(Config, placed(settings))


def replaced(settings: Config, changes: Mapping[str, Any]) -> Config:
    """Returns a config with other values for dotted names, such as `sft.optimizer.beta2`.

    A section is rebuilt once with all of its changes, so that values that go together can change
    together.

    Raises:
        ValueError: an unknown field, or a value that the section refuses.
    """
    below: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        first, _, rest = name.partition(".")
        below.setdefault(first, {})[rest] = value
    known = [field.name for field in dataclasses.fields(cast(Any, settings)) if field.init]
    values = {}
    for name, inner in below.items():
        if name not in known:
            raise ValueError(f"{type(settings).__name__} has no field {name!r}; it has {known}")
        value = getattr(settings, name)
        if "" in inner:
            values[name] = inner[""]
        elif is_config(value):
            values[name] = replaced(value, inner)
        else:
            raise ValueError(f"{name}={value!r} has no field {', '.join(inner)}")
    return cast(Config, dataclasses.replace(cast(Any, settings), **values))


def checked(settings: Config, wanted: type[Config], *, path: str) -> Config:
    """Returns a config in which every field has the type that it is declared with.

    Cards and calls from Python can put anything into a dataclass; values given on the command line
    were checked as they were parsed.

    Args:
        settings: the config that a caller gave.
        wanted: the dataclass that it must be.
        path: its name in messages, as `config.sft`.

    Raises:
        ValueError: another class, a field of another type, or an unusable address;
            names the field.
    """
    if not isinstance(settings, wanted):
        raise ValueError(f"{path}={settings!r} must be a {wanted.__name__}")
    _check_fields(settings, path)
    check_paths(settings, path=path)
    return settings


def check_paths(settings: Any, *, path: str) -> None:
    """Raises ValueError where a field of a config or section is an unusable address.

    Args:
        settings: a config.
        path: its name in messages, as `config.sft`.
    """
    hints = typing.get_type_hints(type(settings), include_extras=True)
    for field in dataclasses.fields(settings):
        value, name = getattr(settings, field.name), f"{path}.{field.name}"
        for one in value if isinstance(value, tuple) else (value,):
            if is_config(one):
                check_paths(one, path=name)
            else:
                check_path(one, hints[field.name], name=name)


def check_path(value: Any, hint: Any, *, name: str) -> None:
    """Raises ValueError where a field is an unusable address; `Text` is no path."""
    if isinstance(value, str) and not _takes_text(hint):
        check_address(value, name=name)


def _takes_text(hint: Any) -> bool:
    return hint == Text or any(_takes_text(one) for one in get_args(hint))


def cards() -> list[str]:
    """Returns the names of the cards in the package."""
    return sorted(path.stem for path in _cards_folder().glob("*.py") if path.stem != "__init__")


def load_card(card: str) -> Any:
    """Returns the config of a card.

    Args:
        card: `FILE.py` or `FILE.py:ARGUMENTS`, or the name of a card of the package, such as
            `rlaif` or `sft:mine.jsonl`.

    Raises:
        ValueError: no such card, no `get_config()` in it, arguments it does not take, or values
            that a config refuses.
        OSError: the file cannot be read.
    """
    name, colon, arguments = card.partition(":")
    path = _card_file(name)
    spec = importlib.util.spec_from_file_location(f"huatuo_jax_card_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # A card may define dataclasses, which look themselves up.
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, ImportError, NameError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from error
    make = getattr(module, "get_config", None)
    if not callable(make):
        raise ValueError(f"{path}: no get_config() in it")
    if colon and not inspect.signature(make).parameters:
        raise ValueError(f"{path}: takes no arguments after the colon, and {arguments!r} is given")
    try:
        config = make(arguments) if colon else make()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not is_config(config):
        raise ValueError(f"{path}: get_config() returns a {type(config).__name__}, not a dataclass")
    return config


def is_config(value: Any) -> bool:
    """Tells whether a value is an instance of a dataclass."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _card_file(name: str) -> pathlib.Path:
    path = pathlib.Path(name)
    if path.suffix == ".py":
        if not path.is_file():
            raise ValueError(f"--config={name}: no such file")
        return path
    found = _cards_folder() / f"{name}.py"
    if not name.isidentifier() or not found.is_file():
        raise ValueError(
            f"--config={name} must be a file that ends in .py, or one of the cards that the "
            f"package brings: {', '.join(cards())}"
        )
    return found


def _cards_folder() -> pathlib.Path:
    """Returns the cards' folder: inside an installed package, beside it in a checkout."""
    package = pathlib.Path(__file__).resolve().parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def _check_fields(settings: Any, path: str) -> None:
    hints = typing.get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        value, hint = getattr(settings, field.name), hints[field.name]
        name = f"{path}.{field.name}"
        bools = isinstance(value, bool) and not _takes_bool(hint)  # To Python a bool is an int.
        try:
            typeguard.check_type(
                value, hint, collection_check_strategy=typeguard.CollectionCheckStrategy.ALL_ITEMS
            )
        except typeguard.TypeCheckError as error:
            raise ValueError(f"{name}={value!r} must be {_in_words(hint)}") from error
        if bools:
            raise ValueError(f"{name}={value!r} must be {_in_words(hint)}")
        for number, one in enumerate(value if isinstance(value, tuple) else ()):
            if is_config(one):
                _check_fields(one, f"{name}[{number}]")
        if is_config(value):
            _check_fields(value, name)


def _takes_bool(hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return any(isinstance(one, bool) for one in get_args(hint))
    return hint in (bool, Any, object) or any(_takes_bool(one) for one in get_args(hint))


def _in_words(hint: Any) -> str:
    """Describes a field's type for a message."""
    if get_origin(hint) is Literal:
        return f"one of {list(get_args(hint))}"
    inner = get_args(hint)
    if get_origin(hint) is tuple:
        return f"a tuple of {_in_words(inner[0])}"
    if inner:
        return " or ".join(_in_words(one) for one in inner)
    if hint is type(None):
        return "None"
    return f"of type {hint.__name__}" if isinstance(hint, type) else str(hint)


def operational(default: Any) -> Any:
    """Returns a dataclass field that may change between restarts: it does not decide results."""
    return dataclasses.field(default=default, metadata={_OPERATIONAL: True})


def identity(config: Any) -> dict[str, Any]:
    """Returns the fields of a config dataclass that decide results, nested, in JSON form."""
    return dict(as_json(_fields(config, everything=False), name=type(config).__name__))


def all_fields(config: Any) -> dict[str, Any]:
    """Returns all fields of a config dataclass, nested, in JSON form."""
    return dict(as_json(_fields(config, everything=True), name=type(config).__name__))


def _fields(config: Any, *, everything: bool) -> Any:
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {
            field.name: _fields(getattr(config, field.name), everything=everything)
            for field in dataclasses.fields(config)
            if everything or not field.metadata.get(_OPERATIONAL, False)
        }
    if isinstance(config, Mapping):
        return {str(name): _fields(value, everything=everything) for name, value in config.items()}
    if isinstance(config, list | tuple):
        return [_fields(value, everything=everything) for value in config]
    return config
