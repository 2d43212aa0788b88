"""The images: a pinned base, an extra that exists, flags that this jaxlib knows, no secret."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from huatuo_jax.compiling.hardware import GPUS

ROOT = pathlib.Path(__file__).resolve().parents[2]
IMAGES = ("gpu", "tpu")


def text_of(image):
    return (ROOT / "docker" / f"Dockerfile.{image}").read_text(encoding="utf-8")


@pytest.mark.parametrize("image", IMAGES)
def test_bases_are_pinned_and_extras_exist(image):
    assert re.findall(r"^FROM (.*)$", text_of(image), re.M) == ["python:3.11.13-slim-bookworm"]
    (extras,) = re.findall(r"^RUN pip install --editable '\.\[([\w,]+)\]'$", text_of(image), re.M)
    for extra in extras.split(","):
        assert f'        "{extra}": ' in (ROOT / "setup.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("image", IMAGES)
def test_nothing_secret_is_built_in(image):
    settings = re.findall(r"^\s*(?:ENV|ARG)\s.*(?:\\\n.*)*", text_of(image), re.M)
    assert not re.search(r"KEY|TOKEN|SECRET|PASSWORD", " ".join(settings))
    assert {".git", ".venv", "runs"} <= set((ROOT / ".dockerignore").read_text().split())


def test_a_gpu_has_as_much_for_programs_as_is_compiled_for():
    (share,) = re.findall(r"XLA_PYTHON_CLIENT_MEM_FRACTION=([\d.]+)", text_of("gpu"))
    for gpu in GPUS.values():
        assert gpu.usable_memory == int(float(share) * gpu.memory)


def test_jaxlib_knows_the_flags_of_the_gpu_image():
    flags = re.findall(r"--xla_gpu_\w+=\w+", text_of("gpu"))
    assert "--xla_gpu_exclude_nondeterministic_ops=true" in flags
    done = subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"],
        env={**os.environ, "XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr  # An unknown flag ends the process.
