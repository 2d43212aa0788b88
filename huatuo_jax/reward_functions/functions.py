"""Reward functions by name: finding them, and what they need.

A reward function is called once for all responses of a rollout,
`fn(prompts, responses, **columns) -> list of float or None`, and may be a coroutine function. Its
columns are lists, one value a response: every other field of the prompts' records, None where a
record lacks it. None as a reward means that the function does not apply to that response.

A coroutine function that is marked `one_by_one` is called for each response by itself as soon as it
is finished, while others are still sampled. One that takes a `grader` or a `verifier` is given that
of the run.
"""

import hashlib
import importlib
import importlib.util
import inspect
import pathlib
import tokenize
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

F = TypeVar("F", bound=Callable[..., Any])
Function = Callable[..., Any]
CheckRow = Callable[[Mapping[str, Any], Mapping[str, Any]], None]
"""Told the fields of a prompt's record and the settings; raises ValueError for what cannot be."""

SERVICES = ("grader", "verifier")
"""Parameters that a run gives to the functions that have them."""

_FIELDS = {"grader": "grader", "verifier": "verifier_model"}
_given: dict[str, Function] = {}
_RESERVED = ("prompts", "responses")


class Call(NamedTuple):
    """A function that is to be called.

    Attributes:
        name: of the function, for messages.
        function: see the module.
        settings: keyword arguments beside the columns.
        services: of `SERVICES`, those that the run has.
    """

    name: str
    function: Function
    settings: Mapping[str, Any]
    services: Mapping[str, Any] = {}

    @property
    def is_one_by_one(self) -> bool:
        """True for a function that is called for each response as it is finished."""
        return getattr(self.function, "is_one_by_one", False)

    @property
    def wants(self) -> tuple[str, ...]:
        """The services that the function has parameters for."""
        parameters = inspect.signature(self.function).parameters
        return tuple(name for name in SERVICES if name in parameters)


def one_by_one(function: F) -> F:
    """Marks a coroutine function whose reward of a response depends on no other response."""
    if not is_async(function):
        raise ValueError(f"{name_of(function)} must be a coroutine function (async def)")
    vars(function)["is_one_by_one"] = True
    return function


def checked_by(check: CheckRow) -> Callable[[F], F]:
    """Gives a function a check of each prompt's record and of its settings, before a run begins."""

    def mark(function: F) -> F:
        vars(function)["check_row"] = check
        return function

    return mark


def name_of(function: Function) -> str:
    """Returns `module:function` for a function object, by which `find` gives it back.

    One that no module holds, such as a notebook's, is found in this process alone.
    """
    owner = function if hasattr(function, "__qualname__") else type(function)
    name = f"{owner.__module__}:{owner.__qualname__}"
    _given[name] = function
    return name


def find(name: str) -> Function:
    """Finds the function that `module:function` or `FILE.py:function` names.

    Raises:
        ValueError: there is no such module, file or function, or it cannot be imported.
    """
    if name in _given:
        return _given[name]
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise ValueError(f"{name!r} must be module:function or FILE.py:function")
    try:
        module = _from_file(place) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{name!r}: {place} cannot be imported ({reason})") from error
    found: Any = module
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise ValueError(f"{name!r}: {place} has no function {attribute!r}")
    function: Function = found
    return function


def check(call: Call, columns: Collection[str]) -> None:
    """Raises ValueError where a call lacks a column or has a setting that the function lacks.

    Args:
        call: the function and its settings.
        columns: that the prompts have.
    """
    parameters = inspect.signature(call.function).parameters
    takes_all = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    named = [
        one
        for one in parameters.values()
        if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)
        and one.name not in (*_RESERVED, *call.wants)
    ]
    for name in _RESERVED:
        if name not in parameters:
            raise ValueError(
                f"{call.name}: must take prompts, responses and **columns; it has no {name!r}"
            )
    missing = [
        one.name
        for one in named
        if one.default is one.empty and one.name not in columns and one.name not in call.settings
    ]
    if missing:
        raise ValueError(
            f"{call.name}: needs {', '.join(missing)}, which neither the prompts nor settings "
            f"have; the prompts have {', '.join(sorted(columns))}"
        )
    for name in call.wants:
        if name not in call.services:
            raise ValueError(f"{call.name}: needs config.ppo.reward.{_FIELDS[name]}, which is None")
    unknown = [name for name in call.settings if name not in parameters]
    if unknown and not takes_all:
        raise ValueError(
            f"{call.name}: has no setting {', '.join(unknown)}; it takes "
            f"{', '.join(one.name for one in named)}"
        )
    taken = [name for name in call.settings if name in {*columns, *_RESERVED, *call.wants}]
    if taken:
        raise ValueError(
            f"{call.name}: settings {', '.join(taken)} must have other names than the columns of "
            "the prompts"
        )


def check_services(calls: Iterable[Call]) -> None:
    """Raises ValueError where a run has a service that none of its functions asks."""
    calls = list(calls)
    for name in {name for one in calls for name in one.services}:
        if not any(name in one.wants for one in calls):
            raise ValueError(
                f"config.ppo.reward.{_FIELDS[name]} has no use: no function of the terms takes a "
                f"{name}; leave it out"
            )


def check_row(call: Call, row: Mapping[str, Any], *, name: str) -> None:
    """Raises ValueError where a prompt's record has a field that a call cannot take.

    Args:
        call: see `checked_by`; without a check all is taken.
        row: the record's fields.
        name: of the prompt, for the message.
    """
    checks = getattr(call.function, "check_row", None)
    if checks is None:
        return
    try:
        checks(row, call.settings)
    except ValueError as error:
        raise ValueError(f"{call.name}: prompt {name!r}: {error}") from error


def identity_of(function: Function) -> str:
    """Returns a hash of a function's source; of its code and name where there is no source."""
    try:
        text = inspect.getsource(function)
    except (OSError, TypeError, SyntaxError, tokenize.TokenError):
        code = getattr(function, "__code__", None)
        name = getattr(function, "__qualname__", type(function).__qualname__)
        if code is None:
            text = name
        else:
            constants = [one for one in code.co_consts if not inspect.iscode(one)]
            text = f"{name} {code.co_code.hex()} {code.co_names} {constants}"
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _from_file(place: str) -> Any:
    path = pathlib.Path(place).resolve()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def is_async(function: Function) -> bool:
    """Tells whether a function, or an object that is called like one, is a coroutine function."""
    whole = function if inspect.isroutine(function) else type(function).__call__
    return inspect.iscoroutinefunction(whole)
