"""A PATH on which nothing but a few tools and a fake gcloud stand: no test reaches a real cloud."""

import pathlib
import shutil
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
TOOLS = (
    "bash cat chmod cut dirname env git grep gzip hostname kill ln mkdir nohup rm setsid sh sleep "
    "sort tail tar touch uname wc"
).split()

UV = """#!/usr/bin/env bash
echo "$*" >>"$FAKE_CLOUD/uv_calls"
if [[ $1 == venv ]]; then
  mkdir -p "${@: -1}/bin"
  ln -sf "$FAKE_PYTHON" "${@: -1}/bin/python"
fi
"""


class Cloud:
    """The fake cloud's folder, and `tpu.sh` run against it."""

    def __init__(self, folder):
        self.folder = folder
        self.shared = folder / "shared"
        self._bin = folder / "bin"
        for made in (self.shared, self._bin):
            made.mkdir()
        for tool in TOOLS:
            (self._bin / tool).symlink_to(shutil.which(tool))
        self._write("gcloud", f'#!/bin/sh\nexec "{sys.executable}" "{HERE}/fake_gcloud.py" "$@"\n')
        self._write("uv", UV)

    def _write(self, name, text):
        path = self._bin / name
        path.write_text(text)
        path.chmod(0o755)

    def remove(self, tool):
        (self._bin / tool).unlink()

    def plan(self, *states):
        (self.folder / "states").write_text("\n".join(states))

    def run(self, *arguments, **options):
        environment = {
            "PATH": str(self._bin),
            "HOME": str(self.folder),
            "FAKE_CLOUD": str(self.folder),
            "FAKE_PYTHON": sys.executable,
            "SHARED": str(self.shared),
        }
        return subprocess.run(
            [ROOT / "launch/tpu/tpu.sh", *arguments],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            **options,
        )


@pytest.fixture
def cloud(tmp_path):
    made = Cloud(tmp_path)
    yield made
    subprocess.run(
        [sys.executable, "-c", "import fake_gcloud; fake_gcloud.take_workers()"],
        env={"FAKE_CLOUD": str(tmp_path), "PYTHONPATH": str(HERE)},
        check=True,
    )
