"""Between the sections of a config file and the dataclasses of the program: config stops here."""

import dataclasses
import os
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin

from ml_collections import ConfigDict, config_dict

Section = TypeVar("Section")

WORKDIR_MARK = "{workdir}"
"""In a path of a config it stands for the run's folder: what earlier stages made is found so."""


def to_section(settings: Any) -> ConfigDict:
    """A dataclass as a section with all of its fields, each of which a flag can override.

    A field that is None becomes a placeholder of its type; a nested section that is None can only
    be given whole.
    """
    hints = typing.get_type_hints(type(settings))
    section = ConfigDict()
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        plain = [one for one in get_args(hints[field.name]) if one in (bool, int, float, str)]
        if value is None and plain:
            section[field.name] = config_dict.placeholder(plain[0])
        else:
            section[field.name] = _as_field(value)
    return section


def placed_in(settings: Section, workdir: str | os.PathLike[str]) -> Section:
    """A dataclass with the run's folder in place of `WORKDIR_MARK`, in all of its sections."""
    folder = os.fspath(workdir)

    def placed(value: Any) -> Any:
        if isinstance(value, str):
            return value.replace(WORKDIR_MARK, folder)
        if isinstance(value, tuple):
            return tuple(map(placed, value))
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            names = [field.name for field in dataclasses.fields(value) if field.init]
            return dataclasses.replace(
                value, **{name: placed(getattr(value, name)) for name in names}
            )
        return value

    return cast(Section, placed(settings))


def from_section(
    cls: type[Section], section: ConfigDict | Mapping[str, Any], *, path: str
) -> Section:
    """The dataclass that a section describes; nested sections become nested dataclasses.

    Args:
        cls: a dataclass.
        section: a ConfigDict or a dict; fields it leaves out keep their defaults.
        path: the section's name in messages, as `config.optimizer`.

    Raises:
        ValueError: an unknown field (the known ones are listed), a missing one, a value of another
            type, or one that the dataclass refuses; each names the field.
    """
    assert dataclasses.is_dataclass(cls)
    if isinstance(section, ConfigDict):
        section = section.to_dict()
    if not isinstance(section, Mapping):
        raise ValueError(f"{path}={section!r} must be a section with fields")
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    if unknown := sorted(set(section) - set(fields)):
        raise ValueError(
            f"{path} has no field {', '.join(unknown)}; it has {', '.join(sorted(fields))}"
        )
    required = {name for name, field in fields.items() if _is_required(field)}
    if missing := sorted(required - set(section)):
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    hints = typing.get_type_hints(cls)
    values = {name: _value(section[name], hints[name], f"{path}.{name}") for name in section}
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _as_field(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_section(value)
    if isinstance(value, tuple):
        # Inside a tuple no flag reaches a single field, so plain dicts do.
        return tuple(
            dataclasses.asdict(one)
            if dataclasses.is_dataclass(one) and not isinstance(one, type)
            else one
            for one in value
        )
    return value


def _is_required(field: dataclasses.Field[Any]) -> bool:
    no_default = field.default is dataclasses.MISSING
    return no_default and field.default_factory is dataclasses.MISSING


def _value(value: Any, wanted: Any, path: str) -> Any:
    """The value as a field's type wants it."""
    origin = get_origin(wanted)
    if origin in (Union, types.UnionType):
        return _one_of(value, get_args(wanted), path)
    if dataclasses.is_dataclass(wanted) and isinstance(wanted, type):
        return from_section(wanted, value, path=path)
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, list | tuple):
            raise _mistyped(path, value, "a list")
        item = get_args(wanted)[0]
        return tuple(_value(one, item, f"{path}[{index}]") for index, one in enumerate(value))
    if origin is Literal:
        if value not in get_args(wanted):
            raise _mistyped(path, value, f"one of {list(get_args(wanted))}")
        return value
    if wanted is Any or not isinstance(wanted, type):
        return value
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, wanted) or (wanted is not bool and isinstance(value, bool)):
        raise _mistyped(path, value, f"of type {wanted.__name__}")
    return value


def _one_of(value: Any, choices: tuple[Any, ...], path: str) -> Any:
    if value is None and type(None) in choices:
        return None
    choices = tuple(choice for choice in choices if choice is not type(None))
    if all(get_origin(choice) is Literal for choice in choices):
        right = [one for choice in choices for one in get_args(choice)]
        if value not in right:
            raise _mistyped(path, value, f"one of {right}")
        return value
    if len(choices) == 1:
        return _value(value, choices[0], path)
    for choice in choices:
        try:
            return _value(value, choice, path)
        except ValueError:
            continue
    raise _mistyped(path, value, " or ".join(_in_words(choice) for choice in choices))


def _in_words(wanted: Any) -> str:
    """A field's type as a message names it."""
    if get_origin(wanted) is Literal:
        return f"one of {list(get_args(wanted))}"
    return wanted.__name__ if isinstance(wanted, type) else str(wanted)


def _mistyped(path: str, value: Any, right: str) -> ValueError:
    return ValueError(f"{path}={value!r} must be {right}")
