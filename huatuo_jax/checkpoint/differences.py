"""What differs between two configs, one readable line for each field."""

import json
from collections.abc import Mapping
from typing import Any

_ABSENT = object()


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
    """Tells lists whose elements are worth comparing one by one."""
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
    """Turns mappings that are no dicts into dicts, which JSON can take."""
    if isinstance(value, Mapping):
        return {str(key): _plain(below) for key, below in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(below) for below in value]
    return value
