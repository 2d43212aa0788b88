"""The README's map names every file there is, and no other; its table is that of the figures."""

import importlib.util
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_the_map_names_every_file_and_no_other():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    the_map = text.split("## The map")[1].split("\n## ")[0]
    named, folder = set(), ""
    for line in the_map.splitlines():
        if found := re.match(r"\*\*`([\w/]+/)`\*\*", line):
            folder = found[1]
        elif found := re.match(r"\| `([\w/.]+\.py)` \|", line):
            named.add(folder + found[1])
    there = {
        str(path.relative_to(ROOT))
        for folder in ("huatuo_jax", "launch", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert named == there


def test_the_table_of_hardware_is_made_of_the_results_as_they_stand():
    spec = importlib.util.spec_from_file_location("hardware", ROOT / "benchmarks" / "hardware.py")
    hardware = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hardware)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert (
        text.split(f"{hardware.BEGIN}\n")[1].split(hardware.END)[0].strip()
        == hardware.table().strip()
    )
