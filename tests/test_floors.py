"""The map of the package, held: imports only look down, and never in a circle."""

import ast
import pathlib

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / "huatuo_jax"

# Room -> floor. A file imports from its own room and from floors below.
FLOORS = {
    "core": 0,
    "backbone": 1,
    "data": 2,
    "hf": 2,
    "checkpoint": 3,
    "clinic": 3,
    "generation": 4,
    "judge": 4,
    "training": 5,
    "preferences": 6,
    "reward_functions": 6,
    "sft": 7,
    "reward": 8,
    "dpo": 7,
    "ppo": 7,
    "evaluation": 9,
    "report": 10,
    "synthesis": 11,
    "recipe": 12,
    "hub": 13,
    "compiling": 13,
    "convert": 13,
    "engines": 13,
    "evaluate": 13,
    "inspect_data": 13,
    "synthesize": 13,
    "api": 14,
    "chat": 15,
    "serving": 15,
    "cli": 16,
}


def modules():
    """Dotted name -> the names of our modules it imports."""
    files = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        files[".".join(parts).removesuffix(".__init__")] = path
    return {name: imports(path, files) for name, path in files.items()}


def imports(path, known):
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("huatuo_jax")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("huatuo_jax"):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else node.module)
    assert found <= set(known), f"{path} imports {found - set(known)}, which is no module"
    return found


def room(module):
    return module.split(".")[1] if "." in module else ""


def test_every_file_has_a_floor():
    rooms = {room(name) for name in modules()} - {""}
    assert rooms <= set(FLOORS), f"no floor for {rooms - set(FLOORS)}"


def test_imports_only_look_down():
    upward = [
        f"{name} imports {target}"
        for name, targets in modules().items()
        for target in targets
        if room(name) and room(name) != room(target) and FLOORS[room(name)] <= FLOORS[room(target)]
    ]
    assert not upward


def test_no_import_goes_in_a_circle():
    graph = modules()
    done, path = set(), []

    def visit(name):
        assert name not in path, f"circle: {' -> '.join([*path[path.index(name) :], name])}"
        if name not in done:
            path.append(name)
            for target in sorted(graph[name]):
                visit(target)
            done.add(path.pop())

    for name in graph:
        visit(name)


def test_commands_stay_thin():
    for path in sorted((PACKAGE.parent / "launch").glob("*.py")):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= 60, f"{path.name} has {lines} lines: move work into the package"


def test_files_stay_readable():
    for path in sorted(PACKAGE.rglob("*.py")):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= 600, f"{path.relative_to(PACKAGE)} has {lines} lines: split it by meaning"
