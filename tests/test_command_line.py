import os
import pathlib
import subprocess
import sys

import pytest

from huatuo_jax import command_line

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command as absl would, with these arguments; gives its exit code and its error."""

    def run(main, *arguments, **keywords):
        monkeypatch.setattr(
            command_line.app, "run", lambda guarded, **_: guarded(["x", *arguments])
        )
        try:
            command_line.run(main, **keywords)
            code = 0
        except SystemExit as end:
            code = end.code
        return code, capsys.readouterr().err

    return run


def test_what_a_user_can_cause_ends_in_one_line(run):
    def main():
        raise ValueError("size is 0;\n  it should be more")

    assert run(main) == (1, "error: size is 0; it should be more\n")
    assert run(main, "stray") == (1, "error: unexpected argument 'stray'; see --help\n")


def test_our_own_bugs_keep_their_traceback(run):
    def main():
        raise KeyError("ours")

    with pytest.raises(KeyError):
        run(main)


def test_a_command_takes_arguments_where_it_says_so(run):
    taken = []
    assert run(taken.extend, "a", "b", positional="FILES") == (0, "")
    assert taken == ["a", "b"]
    assert run(taken.extend, positional="FILES") == (1, "error: no FILES given; see --help\n")


def test_only_a_terminal_has_a_width(monkeypatch):
    monkeypatch.setattr(command_line.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "72")
    monkeypatch.setenv("TERM", "xterm")
    assert command_line.terminal_width() == 72
    monkeypatch.setenv("TERM", "dumb")
    assert command_line.terminal_width() is None


def test_a_reader_that_goes_away_is_no_error(tmp_path, monkeypatch, run):
    with open(tmp_path / "out", "w") as out:
        monkeypatch.setattr(command_line.sys, "stdout", out)

        def main():
            raise BrokenPipeError(32, "Broken pipe")

        code, error = run(main)
        assert (code, error) == (1, "") and os.fstat(out.fileno()).st_rdev != 0


def test_an_override_of_no_field_ends_in_one_line():
    command = [sys.executable, "launch/train.py", "--config=configs/sft.py", "--workdir=x"]
    done = subprocess.run(
        [*command, "--config.sft.batchsize=3"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and "batchsize" in line
    assert "\\" not in line, "no escapes of Python's"
