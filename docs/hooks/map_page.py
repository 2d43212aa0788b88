"""The map of the package: each room and file with the first sentence of its docstring."""

import ast
import inspect
import pathlib
from collections.abc import Iterator

INTRODUCTION = """\
# The map

The package from the ground up: a file imports from its own room, which is a folder, and from lower
floors. Each line is the first sentence of the file's own docstring.
"""
BESIDE = {
    "launch": "Commands: flags in, one call into the package, results on disk.",
    "configs": "Cards: one Python file a config.",
    "benchmarks": "Measurements; their figures are in `benchmarks/results/`.",
}


def page(root: pathlib.Path) -> str:
    """The page, in Markdown.

    Raises:
        ValueError: a file without a docstring, or a room without a floor.
    """
    package = root / "huatuo_jax"
    floors = _floors(root)
    by_floor: dict[int, list[pathlib.Path]] = {}
    for room in sorted(
        {package / path.relative_to(package).parts[0] for path in files_of(package)}
    ):
        if room.stem not in floors:
            raise ValueError(f"{room.stem} has no floor in tests/test_floors.py")
        by_floor.setdefault(floors[room.stem], []).append(room)
    parts = [INTRODUCTION]
    for floor, rooms in sorted(by_floor.items()):
        parts.append(f"## Floor {floor}\n")
        if files := [room for room in rooms if room.is_file()]:
            parts.append(_table(files, package))
        for room in rooms:
            if room.is_dir():
                front = room / "__init__.py"
                says = sentence(front) if front.is_file() else ""
                parts.append(f"### `{room.name}/` {{#{room.name}}}\n\n{says}\n")
                parts.append(_table(files_of(room), room))
    parts.append("## Beside the package\n")
    for name, says in BESIDE.items():
        parts.append(f"### `{name}/` {{#{name}}}\n\n{says}\n")
        parts.append(_table(files_of(root / name), root / name))
    return "\n".join(parts)


def files_of(folder: pathlib.Path) -> list[pathlib.Path]:
    """The Python files of a folder and those below it, fronts of packages apart."""
    return sorted(path for path in folder.rglob("*.py") if path.name != "__init__.py")


def sentence(path: pathlib.Path) -> str:
    """The first paragraph of a file's docstring, in one line.

    Raises:
        ValueError: it has none.
    """
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    if not text:
        raise ValueError(f"{path}: no docstring, which the map is made of")
    return " ".join(inspect.cleandoc(text).partition("\n\n")[0].split())


def _table(files: list[pathlib.Path], folder: pathlib.Path) -> str:
    return "\n".join(["| file | |", "|---|---|", *_lines(files, folder)]) + "\n"


def _lines(files: list[pathlib.Path], folder: pathlib.Path) -> Iterator[str]:
    for path in files:
        text = sentence(path).replace("|", "\\|")
        yield f"| `{path.relative_to(folder).as_posix()}` | {text} |"


def _floors(root: pathlib.Path) -> dict[str, int]:
    """The table that the test of imports holds."""
    tree = ast.parse((root / "tests" / "test_floors.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "FLOORS":
            found: dict[str, int] = ast.literal_eval(node.value)
            return found
    raise ValueError("tests/test_floors.py has no table FLOORS")
