"""Reference pages: every field of every config, every flag of every command, the Python surface.

All of it is read from the dataclasses, signatures and docstrings of the package as it is imported.
"""

import dataclasses
import importlib
import inspect
import re
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

import docstring_parser
from docstring_parser.common import DocstringStyle

import huatuo_jax as hj
from huatuo_jax import cli

CONFIGURATION = "reference/configuration"
TITLES = {
    "recipe": "The recipe",
    "sft": "Fine-tuning",
    "feedback": "Answers, labels and judge",
    "reward": "Reward model",
    "ppo": "PPO",
    "dpo": "DPO",
    "evaluation": "Evaluation",
    "release": "Export and report",
    "shared": "Sections that several stages share",
}
PLACES = {
    **{name: "feedback" for name in ("answers", "labels", "judge")},
    **{name: "release" for name in ("export", "report")},
    **{name: name for name in ("sft", "reward", "ppo", "dpo", "evaluation")},
    **{name: "recipe" for name in ("clinic", "clinic.sizes", "synthesis", "prompts")},
    **{name: "evaluation" for name in ("suites", "suites.files", "suites.examples")},
    "judge.clinic_judge": "feedback",
}
"""Field of the recipe -> page; other fields at the top are on the recipe's own."""


class Section(NamedTuple):
    """A config dataclass, and where it stands in the recipe.

    Attributes:
        cls: the dataclass.
        paths: dotted names of the fields that hold it; "" for a whole config.
        page: one of `TITLES`.
    """

    cls: type[Any]
    paths: tuple[str, ...]
    page: str


def pages() -> dict[str, str]:
    """All reference pages: path on the site -> Markdown.

    Raises:
        ValueError: a field or a public name without documentation.
    """
    found = sections()
    made = {
        f"{CONFIGURATION}/{name}.md": _configuration_page(name, title, found)
        for name, title in TITLES.items()
    }
    made[f"{CONFIGURATION}/index.md"] = _configuration_index(found)
    made["reference/commands.md"] = _commands_page()
    made["reference/api.md"] = _api_page()
    return made


def sections() -> list[Section]:
    """Every dataclass that a config is made of, in the order of its first field."""
    recipe, stages = type(hj.recipe("rlaif")), type(hj.recipe("dpo"))
    paths: dict[type[Any], list[str]] = {}
    for root in (recipe, stages):
        paths.setdefault(root, []).append("")
        _walk(root, "", paths)
    return [Section(cls, tuple(dict.fromkeys(at)), _page_of(at)) for cls, at in paths.items()]


def _walk(cls: type[Any], prefix: str, paths: dict[type[Any], list[str]]) -> None:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        for inner in _dataclasses_in(hints[field.name]):
            many = ".0" if _is_tuple(hints[field.name]) else ""
            path = f"{prefix}{field.name}{many}"
            paths.setdefault(inner, []).append(path)
            if paths[inner].count(path) == 1:
                _walk(inner, f"{path}.", paths)


def _page_of(paths: list[str]) -> str:
    direct = [path for path in paths if path in PLACES]
    if direct:
        return PLACES[direct[0]]
    pages = {PLACES.get(path.partition(".")[0], "recipe") for path in paths}
    if "" in paths or pages == {"recipe"}:
        return "recipe"
    return pages.pop() if len(pages) == 1 else "shared"


def _dataclasses_in(hint: Any) -> list[type[Any]]:
    if dataclasses.is_dataclass(hint):
        return [hint] if isinstance(hint, type) else []
    return [one for part in get_args(hint) for one in _dataclasses_in(part)]


def _is_tuple(hint: Any) -> bool:
    return get_origin(hint) is tuple or any(_is_tuple(one) for one in get_args(hint))


def _configuration_index(found: list[Section]) -> str:
    fields = sum(len(_fields(one.cls)) for one in found)
    lines = [
        "# Configuration",
        "",
        "A card is a Python file whose `get_config()` returns a frozen dataclass. Any field of it "
        "is a flag: `--config.sft.optimizer.learning_rate=1e-4`; `None` is a value; a section that "
        "is None is made by any of its fields. From Python the dots are double underscores: "
        '`hj.recipe("rlaif", sft__optimizer__learning_rate=1e-4)`.',
        "",
        f"These pages list all {fields} fields of the {len(found)} dataclasses, with types, "
        "defaults and documentation, as they stand in the code. A card sets its own values: "
        "`--config=CARD --help` lists the fields with those.",
        "",
        "Fields marked *may change* can be another value when a run is started again; the others "
        "decide results, and another value in the same folder is refused.",
        "",
    ]
    for name, title in TITLES.items():
        here = [
            f"[`{one.cls.__name__}`]({name}.md#{_anchor(one)})" for one in found if one.page == name
        ]
        lines.append(f"- [{title}]({name}.md): {', '.join(here)}")
    return "\n".join(lines) + "\n"


def _configuration_page(name: str, title: str, found: list[Section]) -> str:
    lines = [f"# {title}", ""]
    for one in found:
        if one.page == name:
            lines += _section(one, found)
    return "\n".join(lines) + "\n"


def _section(section: Section, found: list[Section]) -> Iterator[str]:
    cls = section.cls
    documented = _documentation(cls)
    yield f"## {cls.__name__} {{#{_anchor(section)}}}"
    yield ""
    yield _description(documented)
    yield ""
    if any(section.paths):
        yield f"As {_listed([f'`config.{path}`' for path in section.paths if path])}."
        yield ""
    yield f"```py\nfrom {cls.__module__} import {cls.__name__}\n```"
    yield ""
    hints, texts = typing.get_type_hints(cls), _attributes(cls)
    for field in _fields(cls):
        inner = [one for one in found if one.cls in _dataclasses_in(hints[field.name])]
        parts = [f"`{field.name}`", _type(hints[field.name]), _default(field)]
        if any(field.metadata.values()):
            parts.append("*may change*")
        yield " · ".join(parts)
        text = texts.get(field.name)
        if not text and texts:
            raise ValueError(f"{cls.__name__}.{field.name} has no line under Attributes:")
        text = text or "See above."  # One sentence documents all fields of the class.
        links = [
            f"[`{one.cls.__name__}`]({one.page}.md#{_anchor(one)})"
            for one in inner
            if one.cls is not cls
        ]
        if links:
            text = f"{text} Fields: {', '.join(links)}."
        yield f":   {_upper(text)}"
        yield ""


def _anchor(section: Section) -> str:
    """Two classes of a name stand in different rooms, and so under different fields."""
    path = section.paths[0].replace(".", "-").replace("_", "-")
    return f"{section.cls.__name__.lower()}-{path}".rstrip("-")


def _commands_page() -> str:
    lines = [
        "# Commands",
        "",
        "Each command is `huatuo NAME` where the package is installed, and a file in `launch/` in "
        "a checkout. `--flag=value` and `--flag value` are the same; a tuple's values are "
        "separated by commas; `None` is a value. An error is one line, and the exit code is 1.",
        "",
    ]
    for name, command in cli.COMMANDS.items():
        module = importlib.import_module(f"huatuo_jax.{command.module}")
        flags = getattr(module, command.flags)
        lines += [f"## huatuo {name} {{#{name}}}", "", _description(_documentation(flags)), ""]
        if command.with_config:
            lines += [
                "`--config` · card",
                ":   `FILE.py`, `FILE.py:ARGUMENTS`, or the name of a card that the package "
                "brings; its fields are flags too, see [Configuration](configuration/index.md).",
                "",
            ]
        hints, texts = typing.get_type_hints(flags), _attributes(flags)
        sections = command.with_sections
        for shown, field, hint, text in _flags(flags, hints, texts, with_sections=sections):
            lines += [
                " · ".join((f"`{shown}`", _type(hint), _default(field))),
                f":   {_upper(text)}",
                "",
            ]
    return "\n".join(lines) + "\n"


def _flags(
    cls: type[Any],
    hints: dict[str, Any],
    texts: dict[str, str],
    *,
    with_sections: bool,
    before: str = "",
) -> Iterator[tuple[str, "dataclasses.Field[Any]", Any, str]]:
    """A command's flags; those of its sections are flags with or without the section's name."""
    for field in _fields(cls):
        inner = _dataclasses_in(hints[field.name])
        if inner:
            yield from _flags(
                inner[0],
                typing.get_type_hints(inner[0]),
                _attributes(inner[0]),
                with_sections=with_sections,
                before=f"{before}{field.name}." if with_sections else "",
            )
            continue
        if not texts.get(field.name):
            raise ValueError(f"{cls.__name__}.{field.name} has no line under Attributes:")
        is_file = field.name == "files" and not before
        yield (
            ("FILES" if is_file else f"--{before}{field.name}"),
            field,
            hints[field.name],
            texts[field.name],
        )


def _api_page() -> str:
    lines = [
        "# Python API",
        "",
        "    import huatuo_jax as hj",
        "",
        "These names are stable and typed. [From Python](../python.md) shows them in use.",
        "",
    ]
    for name in hj.__all__:
        value = getattr(hj, name)
        if inspect.isclass(value):
            lines += _class(name, value)
        else:
            lines += _callable(f"hj.{name}", value, level=2, anchor=name)
    return "\n".join(lines) + "\n"


def _class(name: str, cls: type[Any]) -> Iterator[str]:
    parsed = _documentation(cls)
    yield f"## {name} {{#{name}}}"
    yield ""
    yield _description(parsed)
    yield ""
    yield from _parameters(
        "Attributes", [one for one in parsed.params if one.args[0] == "attribute"]
    )
    for method, value in vars(cls).items():
        if method.startswith("_") or not (callable(value) or isinstance(value, property)):
            continue
        yield from _callable(f"{name}.{method}", value, level=3, anchor=f"{name}.{method}")


def _callable(shown: str, value: Any, *, level: int, anchor: str) -> Iterator[str]:
    is_property = isinstance(value, property)
    function = value.fget if is_property else value
    parsed = _documentation(function)
    yield f"{'#' * level} {shown} {{#{anchor}}}"
    yield ""
    if not is_property:
        yield f"```py\n{_signature(shown, function)}\n```"
        yield ""
    yield _description(parsed)
    yield ""
    yield from _parameters("Arguments", [one for one in parsed.params if one.args[0] == "param"])
    if parsed.returns is not None:
        yield "**Returns**"
        yield ""
        yield f"{_upper(_text(parsed.returns.description))}"
        yield ""
    if parsed.raises:
        yield "**Raises**"
        yield ""
        for one in parsed.raises:
            yield f"`{one.type_name}`"
            yield f":   {_upper(_text(one.description))}"
            yield ""


def _parameters(title: str, found: list[Any]) -> Iterator[str]:
    if not found:
        return
    yield f"**{title}**"
    yield ""
    for one in found:
        yield f"`{one.arg_name}`"
        yield f":   {_upper(_text(one.description))}"
        yield ""


def _signature(shown: str, function: Any) -> str:
    signature = inspect.signature(function)
    parts, keyword_only = [], False
    for parameter in signature.parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not keyword_only:
            parts.append("*")
            keyword_only = True
        parts.append(_parameter(parameter))
    returns = signature.return_annotation
    end = "" if returns is inspect.Signature.empty else f" -> {_annotation(returns)}"
    inside = "".join(f"\n    {part}," for part in parts)
    return f"{shown}({inside}\n){end}" if parts else f"{shown}(){end}"


def _parameter(parameter: inspect.Parameter) -> str:
    if parameter.kind is inspect.Parameter.VAR_KEYWORD:
        return f"**{parameter.name}"
    default = "" if parameter.default is inspect.Parameter.empty else f" = {parameter.default!r}"
    return f"{parameter.name}: {_annotation(parameter.annotation)}{default}"


def _annotation(annotation: Any) -> str:
    """A type without the modules that its parts are defined in."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r"\b(?:huatuo_jax|typing|collections|numpy|jax)(?:\.\w+)*\.(?=\w)", "", text)


def _fields(cls: type[Any]) -> "list[dataclasses.Field[Any]]":
    return [field for field in dataclasses.fields(cls) if field.init]


def _documentation(value: Any) -> docstring_parser.Docstring:
    text = inspect.getdoc(value)
    if not text:
        raise ValueError(f"{getattr(value, '__qualname__', value)} has no docstring")
    return docstring_parser.parse(text, style=DocstringStyle.GOOGLE)


def _attributes(cls: type[Any]) -> dict[str, str]:
    """Documentation by field, those of base classes too."""
    found: dict[str, str] = {}
    for one in reversed(cls.__mro__):
        if one.__doc__ and dataclasses.is_dataclass(one):
            for parameter in docstring_parser.parse(
                one.__doc__, style=DocstringStyle.GOOGLE
            ).params:
                found[parameter.arg_name] = _text(parameter.description)
    return found


def _description(parsed: docstring_parser.Docstring) -> str:
    """First lines and paragraphs of a docstring."""
    return re.sub(r"(?<![`\w])\{(\w+)\}", r"`{\1}`", parsed.description or "")


def _text(description: str | None) -> str:
    return " ".join((description or "").split())


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _type(hint: Any) -> str:
    """A type in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is typing.Annotated:
        return _type(inner[0])
    if origin is Literal:
        return " or ".join(f"`{one!r}`" for one in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(one) for one in inner)
    if origin is tuple:
        return f"tuple of {_type(inner[0])}"
    if origin is not None:
        return f"{origin.__name__} of {_listed([_type(one) for one in inner])}"
    if hint is type(None):
        return "None"
    return hint.__name__ if isinstance(hint, type) else str(hint)


def _default(field: "dataclasses.Field[Any]") -> str:
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    elif field.default is not dataclasses.MISSING:
        value = field.default
    else:
        return "required"
    return f"default {_value(value)}"


def _value(value: Any) -> str:
    """A default; of a dataclass only the fields that differ from its own defaults."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return f"`{_made(value)}`"
    return f"`{value!r}`"


def _made(value: Any) -> str:
    given = []
    for field in _fields(type(value)):
        now = getattr(value, field.name)
        own = field.default
        if field.default_factory is not dataclasses.MISSING:
            own = field.default_factory()
        if now != own:
            inner = _made(now) if dataclasses.is_dataclass(now) else repr(now)
            given.append(f"{field.name}={inner}")
    return f"{type(value).__name__}({', '.join(given)})"
