"""The package's prose: docstrings say what a thing is or does, in plain words."""

import ast
import pathlib
import re

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / "huatuo_jax"
RIDDLES = re.compile(r"(What|Where|Whether|How|Those)\b")
DIALECT = re.compile(r"that cannot be\b|are told\b|stands? beside\b")


def docstrings():
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(
                node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
            ) and (text := ast.get_docstring(node)):
                yield f"{path.relative_to(PACKAGE)}:{getattr(node, 'name', 'module')}", text


def test_no_docstring_begins_as_a_riddle():
    assert [place for place, text in docstrings() if RIDDLES.match(text)] == []


def test_no_docstring_speaks_a_dialect():
    assert [place for place, text in docstrings() if DIALECT.search(" ".join(text.split()))] == []


def test_every_module_begins_with_one_sentence():
    """It is the module's line in the generated map."""
    firsts = {place: text.split("\n\n")[0] for place, text in docstrings() if ":module" in place}
    assert [place for place, first in firsts.items() if not first.endswith((".", "?"))] == []
