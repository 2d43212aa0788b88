"""Runs the tiny recipe in a process of its own, which a test may kill."""

import pathlib
import sys

from huatuo_jax.recipe.recipe import run_rlaif
from tests.recipe.tiny import tiny_recipe

if __name__ == "__main__":
    data, workdir = map(pathlib.Path, sys.argv[1:])
    run_rlaif(tiny_recipe(data), workdir)
