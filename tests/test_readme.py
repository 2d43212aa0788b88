"""The README is short, and the continuous integration finds its test command in it."""

import pathlib
import subprocess

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = ROOT / "README.md"


def test_it_can_be_read_in_one_go():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 200


def test_the_continuous_integration_finds_the_test_command():
    found = subprocess.run(
        ["bash", "-c", "grep -A 3 -F '<!-- test command -->' README.md | grep '^python3'"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.count("\n") == 1 and "-m pytest" in found.stdout


def test_its_picture_is_there_and_small():
    picture = ROOT / "docs" / "images" / "report.png"
    assert f"]({picture.relative_to(ROOT)})" in README.read_text(encoding="utf-8")
    assert picture.stat().st_size < 300_000
