"""The README's map names every file there is, and no other."""

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
