"""Reward functions by name: finding them, what they need, and calling them all for a rollout.

A reward function is called once for all responses of a rollout,
`fn(prompts, responses, **columns) -> list of float or None`, and may be a coroutine function. Its
columns are lists, one value a response: every other field of the prompts' records, None where a
record lacks it. None as a reward means that the function does not apply to that response.
"""

import asyncio
import concurrent.futures
import hashlib
import importlib
import importlib.util
import inspect
import math
import pathlib
import tokenize
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

Function = Callable[..., Any]
Messages = Sequence[Mapping[str, str]]

_given: dict[str, Function] = {}
_RESERVED = ("prompts", "responses")


class Asked(NamedTuple):
    """Responses and all that a reward function may read, one of each for a response.

    Attributes:
        prompts: messages with `role` and `content`.
        responses: texts.
        columns: by name.
    """

    prompts: Sequence[Messages]
    responses: Sequence[str]
    columns: Mapping[str, Sequence[Any]]


class Call(NamedTuple):
    """A function that is to be called.

    Attributes:
        name: of the function, for messages.
        function: see the module.
        settings: keyword arguments beside the columns.
    """

    name: str
    function: Function
    settings: Mapping[str, Any]


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
        if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL) and one.name not in _RESERVED
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
    unknown = [name for name in call.settings if name not in parameters]
    if unknown and not takes_all:
        raise ValueError(
            f"{call.name}: has no setting {', '.join(unknown)}; it takes "
            f"{', '.join(one.name for one in named)}"
        )
    taken = [name for name in call.settings if name in columns or name in _RESERVED]
    if taken:
        raise ValueError(
            f"{call.name}: settings {', '.join(taken)} must have other names than the columns of "
            "the prompts"
        )


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


def call_all(calls: Sequence[Call], asked: Asked) -> list[list[float | None]]:
    """Calls all functions, the coroutine functions among them at once.

    Args:
        calls: of functions that `check` passed.
        asked: what they are given.

    Returns:
        The rewards of each, one a response.

    Raises:
        ValueError: a function raised, or gave something else than a list of as many numbers and
            None as there are responses.
    """
    found: list[Any] = [None] * len(calls)
    waiting = [n for n, call in enumerate(calls) if _is_async(call.function)]
    for number, call in enumerate(calls):
        if number not in waiting:
            found[number] = _called(call, asked)
    if waiting:
        # A thread of its own, as a notebook has a loop that runs already.
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            rewards = pool.submit(
                asyncio.run, _gathered([calls[n] for n in waiting], asked)
            ).result()
        for number, values in zip(waiting, rewards, strict=True):
            found[number] = values
    return [_checked(call, values, asked) for call, values in zip(calls, found, strict=True)]


def _from_file(place: str) -> Any:
    path = pathlib.Path(place).resolve()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _is_async(function: Function) -> bool:
    whole = function if inspect.isroutine(function) else type(function).__call__
    return inspect.iscoroutinefunction(whole)


def _arguments(call: Call, asked: Asked) -> dict[str, Any]:
    """The keyword arguments of a call: columns that it takes, and its settings."""
    parameters = inspect.signature(call.function).parameters
    takes_all = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    columns = {
        name: list(values)
        for name, values in asked.columns.items()
        if takes_all or name in parameters
    }
    whole = {"prompts": list(asked.prompts), "responses": list(asked.responses)}
    return whole | columns | dict(call.settings)


def _failed(call: Call, error: Exception) -> ValueError:
    return ValueError(f"{call.name}: raised {type(error).__name__}: {error}")


def _called(call: Call, asked: Asked) -> Any:
    try:
        return call.function(**_arguments(call, asked))
    except Exception as error:
        raise _failed(call, error) from error


async def _gathered(calls: Sequence[Call], asked: Asked) -> list[Any]:
    found = await asyncio.gather(
        *(call.function(**_arguments(call, asked)) for call in calls), return_exceptions=True
    )
    for call, one in zip(calls, found, strict=True):
        if isinstance(one, Exception):
            raise _failed(call, one) from one
        if isinstance(one, BaseException):
            raise one
    return found


def _checked(call: Call, values: Any, asked: Asked) -> list[float | None]:
    """Returns a function's rewards as numbers and None."""
    number = len(asked.responses)
    if isinstance(values, str | bytes | Mapping) or not hasattr(values, "__len__"):
        raise ValueError(
            f"{call.name}: returned {type(values).__name__}; it should be a list of {number} "
            "numbers or None"
        )
    if len(values) != number:
        raise ValueError(
            f"{call.name}: returned {len(values)} rewards for {number} responses; it should be "
            "one each, None where it does not apply"
        )
    return [_number(call, index, one) for index, one in enumerate(values)]


def _number(call: Call, index: int, value: Any) -> float | None:
    if value is None:
        return None
    is_number = hasattr(value, "__float__") and not isinstance(value, str | bytes)
    if not is_number or not math.isfinite(found := float(value)):
        raise ValueError(
            f"{call.name}: returned {value!r} for response {index}; it should be a number, or "
            "None where it does not apply"
        )
    return found
