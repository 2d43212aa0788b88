"""A command of the console, called in the tests' process, which has imported everything already."""

import contextlib
import io
import subprocess
import sys

import pytest

from huatuo_jax import cli


def call(name, *flags):
    """Runs the command as `python launch/NAME.py FLAGS` does; its exit code, output and error."""
    arguments, code = [f"launch/{name}.py", *flags], 0
    out, error = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            try:
                cli.run(name)
            except SystemExit as end:
                code = end.code
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), error.getvalue())
