"""The requests to a teacher: templates in `prompts/`, a file for each task and language."""

import functools
import pathlib
import re
from collections.abc import Mapping

from huatuo_jax.judge.judgements import sha256
from huatuo_jax.judge.openai import template_parts

_FOLDER = pathlib.Path(__file__).with_name("prompts")
_PLACE = re.compile(r"\{\{(\w+)\}\}")


def fill(name: str, language: str, values: Mapping[str, str]) -> list[dict[str, str]]:
    """Returns the messages of a template, all its places filled in one pass.

    Args:
        name: of the task.
        language: `zh` or `en`.
        values: by the names of the places; no text among them is read as a place.
    """
    return [
        {"role": role, "content": _PLACE.sub(lambda place: values[place[1]], part)}
        for role, part in zip(("system", "user"), _template(name, language), strict=True)
        if part
    ]


def digest(*names: str) -> str:
    """Returns a hash of the templates of some tasks in all their languages."""
    paths = sorted(path for name in names for path in _FOLDER.glob(f"{name}.*.txt"))
    assert paths, names
    return sha256("".join(path.read_text(encoding="utf-8") for path in paths))[:16]


@functools.cache
def _template(name: str, language: str) -> tuple[str, str]:
    path = _FOLDER / f"{name}.{language}.txt"
    return template_parts(path.read_text(encoding="utf-8"), path)
