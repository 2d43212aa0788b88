"""One jitted function for functions of equal code that hold equal values, in the tests' process.

Each test makes its own trainers, and each trainer its own closures, so jax would trace, lower and
load the same small programs for every test. `jax.jit` is asked for a jitted function here instead:
functions are equal where their code is the same object and all that they hold (closures, defaults,
arguments of partial functions, fields of frozen dataclasses) is equal; what may change is compared
by identity, lists and dictionaries included. A function under which an attribute is patched at
present is never shared with one under which it is not, nor are an engine's programs; only what no
program is traced from may be patched under shared ones.
"""

import dataclasses
import functools
import sys
import types
from collections.abc import Hashable
from typing import Any

import jax
import numpy as np
import pytest

from huatuo_jax.generation.programs import programs_of

_MAX_PROGRAMS = 64
_APART = object()  # Its change is a change like any other.

NOT_TRACED = (
    *(f"huatuo_jax.{room}." for room in ("api", "clinic", "data", "hub", "judge", "preferences")),
    *(f"huatuo_jax.{room}." for room in ("recipe", "report", "serving", "synthesis")),
    *(f"huatuo_jax.core.{module}." for module in ("addresses", "command_line", "distributed")),
    "huatuo_jax.checkpoint.models.",
    "huatuo_jax.evaluation.respondents.",
    "huatuo_jax.generation.engine.",
    "huatuo_jax.ppo.trainer._evaluated",
    # Meshes are of a program's key.
    *(f"huatuo_jax.core.sharding.{name}" for name in ("host_mesh", "make_mesh")),
    *("asyncio.", "builtins.", "importlib.", "os.", "socket.", "sys.", "time."),
    *("huggingface_hub.", "uvicorn."),
)
"""How the full names of attributes begin that a program cannot depend on."""


class _Same:
    """Compares by identity, and keeps the object alive so that its identity is not used anew."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.held is other.held

    def __hash__(self) -> int:
        return id(self.held)


def key_of(held: Any, inside: tuple[int, ...] = ()) -> Hashable:
    """Returns a key that two values share only if one may stand for the other in a program."""
    if id(held) in inside:  # A function that calls itself.
        return ("again", inside.index(id(held)))
    inside = (*inside, id(held))
    keys = functools.partial(_keys, inside=inside)
    if isinstance(held, functools.partial):
        return ("partial", *keys((held.func, held.args, *_items(held.keywords))))
    if isinstance(held, types.FunctionType):
        cells = (cell.cell_contents for cell in held.__closure__ or ())
        values = (held.__defaults__, *_items(held.__kwdefaults__), *_items(held.__dict__), *cells)
        return ("function", _Same(held.__code__), _Same(held.__globals__), *keys(values))
    if isinstance(held, types.MethodType):
        return ("method", *keys((held.__func__, held.__self__)))
    if isinstance(held, tuple):
        return (type(held), *keys(held))
    if dataclasses.is_dataclass(held) and not isinstance(held, type) and _is_frozen(held):
        return (type(held), *keys(getattr(held, one.name) for one in dataclasses.fields(held)))
    if held is None or isinstance(held, _BY_VALUE):
        # 1, 1.0 and True are equal, and make different programs; so do 0.0 and -0.0.
        return (type(held), held, repr(held))
    return _Same(held)


_BY_VALUE = (
    bool,
    int,
    float,
    str,
    bytes,
    np.dtype,
    np.generic,
    jax.sharding.Sharding,
    jax.sharding.Mesh,
    jax.sharding.PartitionSpec,
)


def _keys(values: Any, *, inside: tuple[int, ...]) -> tuple[Hashable, ...]:
    return tuple(key_of(value, inside) for value in values)


def _items(named: dict[str, Any] | None) -> tuple[tuple[str, Any], ...]:
    return tuple((named or {}).items())


def _is_frozen(held: Any) -> bool:
    """Says whether fields do not change; flax's modules refuse it too, by their own means."""
    return held.__dataclass_params__.frozen or hasattr(held, "_state")


def share_programs() -> None:
    """Makes `jax.jit` return the jitted function of an equal function, where there is one."""
    jit, set_attribute, undo = jax.jit, pytest.MonkeyPatch.setattr, pytest.MonkeyPatch.undo
    patched: dict[int, tuple[Hashable, ...]] = {}

    @functools.lru_cache(maxsize=_MAX_PROGRAMS)
    def made(key: "_Made") -> Any:
        return jit(key.function, **key.options)

    @functools.wraps(jit)
    def shared(function: Any = None, /, **options: Any) -> Any:
        if function is None:
            return functools.partial(shared, **options)
        try:
            leaves, form = jax.tree.flatten(options, is_leaf=lambda leaf: leaf is None)
            key = (key_of((function, *leaves)), form, *patched.values())
        except ValueError:  # A closure's variable that has no value yet.
            return jit(function, **options)
        return made(_Made(key, function, options))

    def counted(patch: pytest.MonkeyPatch, target: Any, *rest: Any, **named: Any) -> None:
        if not full_name(target, *rest).startswith(NOT_TRACED):
            patched[id(patch)] = (*patched.get(id(patch), ()), object())
            programs_of.cache_clear()
        set_attribute(patch, target, *rest, **named)

    def undone(patch: pytest.MonkeyPatch) -> None:
        undo(patch)
        if patched.pop(id(patch), None):
            programs_of.cache_clear()

    jax.jit = shared
    pytest.MonkeyPatch.setattr, pytest.MonkeyPatch.undo = counted, undone


def apart(patch: pytest.MonkeyPatch) -> None:
    """Shares no program made before, from here to the patch's end, for a test that counts them."""
    patch.setattr(sys.modules[__name__], "_APART", object())


def full_name(target: Any, *rest: Any) -> str:
    """Returns the full name of what `MonkeyPatch.setattr` is asked to set: module and attribute."""
    if isinstance(target, str):
        return target
    if not isinstance(target, types.ModuleType):
        target = sys.modules[(target if isinstance(target, type) else type(target)).__module__]
    return f"{target.__name__}.{rest[0]}"


class _Made:
    """The arguments of `jax.jit`, compared by their key."""

    def __init__(self, key: Hashable, function: Any, options: dict[str, Any]) -> None:
        self.key, self.function, self.options = key, function, options
        self._hash = hash(key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Made) and self.key == other.key

    def __hash__(self) -> int:
        return self._hash
