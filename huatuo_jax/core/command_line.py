"""Runs a command: flags from a dataclass, one clear line for an error, exit codes.

A command's flags are the fields of a frozen dataclass, with its `Attributes:` as their help; a
command that takes `--config` has the fields of that card's config as flags too. tyro parses the
values and writes the help.
"""

import contextlib
import dataclasses
import difflib
import inspect
import io
import os
import shutil
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, TypeVar, Union, cast, get_args, get_origin

import tyro
from absl import logging

from huatuo_jax.core import distributed
from huatuo_jax.core.config import cards, check_path, check_paths, is_config, load_card, replaced
from huatuo_jax.core.files import error_of_server

Flags = TypeVar("Flags")

Files = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILES")]
"""The type of a field that takes the arguments that are not flags."""

_CONFIG = "config."
_WIDE = 10_000  # Columns in which each of tyro's messages stands in one line.
Given = dict[str, list[str]]
"""Maps a field's name to its values as they were written."""

_BOOLEANS = ("true", "false", "none")


def run(
    main: Callable[..., None],
    flags: type[Any],
    *,
    with_config: bool = False,
    with_sections: bool = False,
    first: Sequence[str] = (),
    adapt: Callable[[Any], Any] = lambda config: config,
    name: str | None = None,
    arguments: Sequence[str] | None = None,
) -> None:
    """Parses a command's flags and runs it; a user's error ends in one line and exit code 1.

    Args:
        main: the command; takes the flags, and with `with_config` the config too. Its ValueError
            and OSError are shown as messages, and what a bucket's server answers; any other error
            keeps its traceback.
        flags: the dataclass whose fields are its flags; those of its sections are flags without
            the section's name.
        with_config: take `--config=CARD` and `--config.FIELD=VALUE` as flags, too.
        with_sections: name the flags of sections with their section, `--SECTION.FIELD`.
        first: fields of the config that the defaults of others follow from.
        adapt: takes the config with those fields and returns the one to which the others apply.
        name: of the command in its help; None for the file that Python runs.
        arguments: those of the command line; None for the process's own.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    name = name or os.path.basename(sys.argv[0])
    # Orbax and TFDS log every file they touch.
    logging.set_verbosity(logging.WARNING)
    try:
        if with_config:
            main(*parse_with_config(flags, given, name=name, first=first, adapt=adapt))
        else:
            main(parse(flags, given, name=name, flat=not with_sections))
    except BrokenPipeError:
        # The reader of the output has closed it (`| head`). Python flushes standard output once
        # more as it ends, which must not fail either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        if (told := error_of_server(error)) is None:
            raise
        print(f"error: {told}", file=sys.stderr)
        sys.exit(1)
    finally:
        distributed.leave()


def parse(flags: type[Flags], arguments: Sequence[str], *, name: str, flat: bool = True) -> Flags:
    """Parses the flags of a command.

    `--name=value` and `--name value` are the same, and `-` in a name is `_`. A tuple's values stand
    one after the other, or after `=` with commas between them; given again, a flag adds to it. The
    name of a boolean alone is True, with `no` before it False. `None` is None where the field takes
    it. With `flat` the fields of a section are flags without the section's name.

    Raises:
        ValueError: an unknown flag, a missing one, a value of the wrong type, or an unusable
            address.
        SystemExit: after `--help`.
    """
    known = _fields_of(flags, None, flat=flat)
    if _wants_help(arguments):
        _print_help(flags, None, name=name, flat=flat)
        raise SystemExit(0)
    given = _read(arguments, known)
    for field in given:
        if known[field].section is not None:
            raise _of_a_section(field, given[field], known)
    _check_not_missing(known, given)
    return cast(Flags, _by_tyro(flags, None, given, name=name, flat=flat))


def parse_with_config(
    flags: type[Flags],
    arguments: Sequence[str],
    *,
    name: str,
    first: Sequence[str] = (),
    adapt: Callable[[Any], Any] = lambda config: config,
) -> tuple[Flags, Any]:
    """Parses the flags of a command, and the config of its card with the fields given.

    Flags are as in `parse`. A field of a section that is None makes the section, and
    `--config.SECTION=None` takes one away. See `run` for `first` and `adapt`.

    Raises:
        ValueError: as `parse`; no `--config`, an unreadable card (see `config.load_card`),
            or a field that its config does not have.
        SystemExit: after `--help`, which beside a config lists all of its fields.
    """
    own = _fields_of(flags, None, flat=True)
    card, rest = _without_card(arguments)
    if card is None:
        if _wants_help(arguments):
            _print_help(flags, None, name=name, flat=True)
            print(_config_help())
            raise SystemExit(0)
        raise ValueError("--config is missing; name a card, such as --config=rlaif")
    settings = load_card(card)
    fields = _fields_of(type(settings), settings, prefix=_CONFIG)
    names = {one for one in fields if one.removeprefix(_CONFIG).partition(".")[0] in first}
    sought = _sought(rest, names)
    for field, values in sought.items():
        check_path(values[0], fields[field].hint, name=f"--{field}")
    if sought:
        settings = adapt(_config_of(settings, sought, fields, name=name))
        fields = _fields_of(type(settings), settings, prefix=_CONFIG)
    if _wants_help(rest):
        _print_help(flags, None, name=name, flat=True)
        _print_help(type(settings), settings, name=name, prefix=_CONFIG)
        for section in _absent_sections(fields):
            made = fields[section].section
            assert made is not None
            print(f"{section} is None. With any of these it is a {made.__name__}:")
            _print_help(made, None, name=name, prefix=f"{section}.")
        raise SystemExit(0)
    given = _read(rest, own | fields)
    _check_not_missing(own, given)
    own_given = {key: values for key, values in given.items() if key in own}
    found = _by_tyro(flags, None, own_given, name=name, flat=True)
    config = _config_of(settings, given, fields, name=name)
    check_paths(config, path="config")  # A card's own, and its arguments.
    return found, config


def terminal_width() -> int | None:
    """Returns the columns of the terminal; None where standard output is not one."""
    if not sys.stdout.isatty() or os.environ.get("TERM") == "dumb":
        return None
    return shutil.get_terminal_size().columns


class _Field(NamedTuple):
    """A field that a flag can set, or a section of them.

    Attributes:
        hint: its type.
        is_required: has no default.
        section: the dataclass of a section; None for a plain field.
        absent: name of the outermost section around it, or of itself, that is None; None if none.
    """

    hint: Any
    is_required: bool
    section: type[Any] | None
    absent: str | None


def _fields_of(
    cls: type[Any],
    default: Any,
    *,
    prefix: str = "",
    flat: bool = False,
    absent: str | None = None,
) -> dict[str, _Field]:
    """Returns all fields of a dataclass and of its sections by the names of their flags."""
    found: dict[str, _Field] = {}
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        value = _default_of(field) if default is None else getattr(default, field.name)
        name, hint = f"{prefix}{field.name}", hints[field.name]
        section = type(value) if is_config(value) else _section_of(hint)
        gone = absent or (name if section is not None and value is None else None)
        found[name] = _Field(hint, value is dataclasses.MISSING, section, gone)
        below = "" if flat else f"{name}."
        if section is not None:
            inner = value if is_config(value) else None
            found |= _fields_of(section, inner, prefix=below, flat=flat, absent=gone)
        for number, one in enumerate(value if isinstance(value, tuple) else ()):
            if is_config(one):
                found |= _fields_of(type(one), one, prefix=f"{below}{number}.", absent=gone)
    return found


def _default_of(field: "dataclasses.Field[Any]") -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _section_of(hint: Any) -> type[Any] | None:
    """Returns the dataclass in a field's type, alone or beside None; None if there is none."""
    choices = [one for one in _choices(hint) if dataclasses.is_dataclass(one)]
    return cast(type[Any], choices[0]) if choices else None


def _choices(hint: Any) -> tuple[Any, ...]:
    if get_origin(hint) is Annotated:
        return _choices(get_args(hint)[0])
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _takes_many(hint: Any) -> bool:
    return any(get_origin(one) is tuple for one in _choices(hint))


def _is_positional(hint: Any) -> bool:
    return get_origin(hint) is Annotated and hint == Files


def _without_card(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Returns the card that `--config` names, and the other arguments.

    Raises:
        ValueError: two cards, or none after the flag.
    """
    cards, rest, tokens = [], [], iter(arguments)
    for token in tokens:
        flag, equals, value = token.partition("=")
        if flag in ("--config", "-config"):
            cards.append(value if equals else next(tokens, ""))
        else:
            rest.append(token)
    if len(cards) > 1 or "" in cards:
        raise ValueError(f"--config={','.join(cards)} must be one card")
    return (cards[0] if cards else None), rest


def _sought(arguments: Sequence[str], names: Collection[str]) -> Given:
    """Returns the values of some plain fields, skipping all other arguments."""
    found: Given = {}
    tokens = list(arguments)
    while tokens:
        flag, equals, value = tokens.pop(0).partition("=")
        name = flag.lstrip("-").replace("-", "_")
        if flag.startswith("-") and name in names:
            found[name] = [value if equals or not tokens else tokens.pop(0)]
    return found


def _wants_help(arguments: Sequence[str]) -> bool:
    return bool({"-h", "--help", "-help"} & set(arguments))


def _read(arguments: Sequence[str], known: Mapping[str, _Field]) -> Given:
    """Returns the values that the command line gives to each field.

    Raises:
        ValueError: a flag that is no field's, one without a value, two values for one field, or an
            address where a path may be.
    """
    given: Given = {}
    files = next((name for name, field in known.items() if _is_positional(field.hint)), None)
    tokens = list(arguments)
    while tokens:
        token = tokens.pop(0)
        if not token.startswith("-") or token == "-":
            if files is None:
                raise ValueError(f"unexpected argument {token!r}; see --help")
            check_path(token, known[files].hint, name=files.upper())
            given.setdefault(files, []).append(token)
            continue
        flag, equals, value = token.partition("=")
        name, is_negated = _field_name(flag.lstrip("-").replace("-", "_"), known)
        hint = known[name].hint
        if bool in _choices(hint):
            if not equals and not is_negated and tokens and tokens[0].lower() in _BOOLEANS:
                equals, value = "=", tokens.pop(0)
            if is_negated and equals:
                raise ValueError(f"{flag} takes no value, and {value!r} is given")
            value = value.capitalize() if equals else str(not is_negated)
            found = [value]
        elif _takes_many(hint):
            found = value.split(",") if value else []
            while not equals and tokens and not tokens[0].startswith("--"):
                found.append(tokens.pop(0))
            found = given.get(name, []) + found
        elif equals:
            found = [value]
        elif tokens:
            found = [tokens.pop(0)]
        else:
            raise ValueError(f"{flag} needs a value")
        if name in given and not _takes_many(hint):
            raise ValueError(f"{flag} is given twice")  # A value may be a secret.
        for one in found:
            check_path(one, hint, name=flag)
        given[name] = found
    return given


def _field_name(name: str, known: Mapping[str, _Field]) -> tuple[str, bool]:
    """Returns the field of a flag, and True if `no` is before its name.

    Raises:
        ValueError: an unknown flag; names the nearest field.
    """
    if name in known and not _is_positional(known[name].hint):
        return name, False
    above, _, last = name.rpartition(".")
    if last.startswith("no"):
        positive = f"{above}.".lstrip(".") + last.removeprefix("no").removeprefix("_")
        if positive in known and bool in _choices(known[positive].hint):
            return positive, True
    fields = [one for one in known if one.rpartition(".")[0] == above] if above else list(known)
    if above in known:
        ends = [one.rpartition(".")[2] for one in fields]
        near = difflib.get_close_matches(last, ends, n=1)
        hint = f"; {above} has {', '.join(ends)}"
        if near:
            hint = f"; did you mean --{above}.{near[0]}?"
        raise ValueError(f"unknown field --{name}{hint}")
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    same_end = [one for one in known if one.rpartition(".")[2] == last]
    near += [one for one in same_end if one not in near][: 3 - len(near)]
    if not near:
        by_end = {one.rpartition(".")[2]: one for one in reversed(list(known))}
        near = [by_end[end] for end in difflib.get_close_matches(last, by_end, n=1)]
    hint = f"; did you mean {' or '.join(f'--{one}' for one in near)}?" if near else "; see --help"
    raise ValueError(f"unknown field --{name}{hint}")


def _check_not_missing(known: Mapping[str, _Field], given: Given) -> None:
    for name, field in known.items():
        if field.is_required and field.absent is None and not given.get(name):
            if field.section is not None:
                continue  # Its fields are looked at one by one.
            if _is_positional(field.hint):
                raise ValueError(f"no {name.upper()} given; see --help")
            raise ValueError(f"--{name} is missing; see --help")


def _config_of(settings: Any, given: Given, fields: Mapping[str, _Field], *, name: str) -> Any:
    """Returns the config with the given fields.

    Raises:
        ValueError: a value of another type, or one that the config refuses.
    """
    made: dict[str, Any] = {}
    plain: Given = {}
    inner: dict[str, Given] = {}
    for field_name, values in given.items():
        if field_name not in fields:
            continue
        field = fields[field_name]
        if field.section is not None:
            if values != ["None"] or type(None) not in _choices(field.hint):
                raise _of_a_section(field_name, values, fields)
            made[field_name.removeprefix(_CONFIG)] = None
        elif field.absent is not None:
            inner.setdefault(field.absent, {})[field_name] = values
        else:
            plain[field_name] = values
    for section, values_of in inner.items():
        cls = fields[section].section
        assert cls is not None
        start = f"{section}."
        _check_not_missing(_fields_of(cls, None, prefix=start), values_of)
        made[section.removeprefix(_CONFIG)] = _by_tyro(
            cls, None, values_of, name=name, prefix=start
        )
    for gone in made:
        for field_name in plain:
            if made[gone] is None and field_name.startswith(f"{_CONFIG}{gone}."):
                raise ValueError(f"--{field_name}: {_CONFIG}{gone}=None has no fields")
    # Both at once, as a field may be valid only together with another.
    return _by_tyro(type(settings), replaced(settings, made), plain, name=name, prefix=_CONFIG)


def _of_a_section(name: str, values: Sequence[str], known: Mapping[str, _Field]) -> ValueError:
    names = list(known)
    first_field = names[names.index(name) + 1]
    return ValueError(
        f"--{name}={values[0]} is a section; give its fields, such as --{first_field}"
    )


def _config_help() -> str:
    brought = f"FILE.py, FILE.py:ARGUMENTS, or the name of a card: {', '.join(cards())}"
    fields = "a field of its config; --config=CARD --help lists all of them"
    return (
        f"--config=CARD\n{_filled(brought, indent=6)}\n"
        f"--config.FIELD=VALUE\n{_filled(fields, indent=6)}"
    )


def _filled(text: str, *, indent: int = 0) -> str:
    """Wraps paragraphs to the width of the terminal."""
    columns, start = shutil.get_terminal_size().columns, " " * indent
    return "\n\n".join(
        textwrap.fill(paragraph, columns, initial_indent=start, subsequent_indent=start)
        for paragraph in text.split("\n\n")
    )


def _absent_sections(fields: Mapping[str, _Field]) -> list[str]:
    return [name for name, field in fields.items() if field.absent == name]


def _by_tyro(
    cls: type[Any],
    default: Any,
    given: Given,
    *,
    name: str,
    prefix: str = "",
    flat: bool = False,
) -> Any:
    """Makes a dataclass with the given values, typed by its fields.

    Raises:
        ValueError: a value of another type, or one that the dataclass refuses.
    """
    arguments: list[str] = []
    positional = _positional_name(cls) if flat else None
    for field, values in given.items():
        if field == positional:
            arguments += values
        else:
            arguments += [f"--{field}={values[0]}"] if len(values) == 1 else [f"--{field}", *values]
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told), _columns(_WIDE):
            return _tyro(cls, default, arguments, name=name, prefix=prefix, flat=flat)
    except SystemExit:
        # The class that refuses a field is no flag; its name would mislead a user.
        message = _message(told.getvalue()).removeprefix(f"{cls.__name__}: ")
        raise ValueError(message) from None


def _positional_name(cls: type[Any]) -> str | None:
    hints = typing.get_type_hints(cls, include_extras=True)
    return next((name for name, hint in hints.items() if _is_positional(hint)), None)


def _print_help(
    cls: type[Any], default: Any, *, name: str, prefix: str = "", flat: bool = False
) -> None:
    if not prefix:
        does = (inspect.getdoc(cls) or "").partition("Attributes:")[0]
        print(_filled(does.rstrip()), end="\n\n")
    with contextlib.suppress(SystemExit):
        _tyro(cls, default, ["--help"], name=name, prefix=prefix, flat=flat)


def _tyro(
    cls: type[Any], default: Any, arguments: list[str], *, name: str, prefix: str, flat: bool
) -> Any:
    """Calls tyro on arguments whose flags are complete names."""
    parts = [part for part in prefix.split(".") if part]
    wrapped, value = cls, default
    for part in reversed(parts):
        field = dataclasses.field() if value is None else dataclasses.field(default=value)
        wrapped = dataclasses.make_dataclass(part, [(part, wrapped, field)], frozen=True)
        value = None if value is None else wrapped()
    markers: list[Any] = [tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff]
    if flat:
        markers.append(tyro.conf.OmitArgPrefixes)
    found = tyro.cli(
        wrapped,
        prog=name,
        description="",
        default=value,
        args=arguments,
        use_underscores=True,
        config=tuple(markers),
    )
    for part in parts:
        found = getattr(found, part)
    return found


def _message(text: str) -> str:
    """Returns tyro's message without its frame and its advice to read the help."""
    lines = [line.strip("│╭╮╰╯─|+- \t") for line in text.splitlines()]
    body = [line for line in lines[1:] if line]
    for number, line in enumerate(body):
        if line.startswith(("For full helptext", "Argument helptext")):
            body = body[:number]
            break
    return " ".join(body).removeprefix("Error parsing ") or text


@contextlib.contextmanager
def _columns(width: int) -> Iterator[None]:
    """Sets the width for which tyro formats."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(width)
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
