"""The names of the package: imported when they are used, and never hidden by a submodule."""

import ast
import dataclasses
import pathlib
import subprocess
import sys
from typing import get_type_hints

import pytest

import huatuo_jax as hj
from huatuo_jax.api.models import SamplingFields
from huatuo_jax.api.stages import DpoFields, PpoFields, RewardFields, SftFields
from huatuo_jax.dpo import DpoConfig
from huatuo_jax.generation.requests import SamplingConfig
from huatuo_jax.ppo.config import PpoConfig
from huatuo_jax.reward.config import RewardConfig
from huatuo_jax.sft import SftConfig

ROOT = pathlib.Path(hj.__file__).resolve().parents[1]


def run(code):
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_imports_nothing_else():
    code = "import huatuo_jax, sys; print([n for n in sys.modules if n.startswith('huatuo_jax.')]"
    assert run(f"{code}, 'jax' in sys.modules)") == "[] False\n"


def test_a_lower_floor_is_imported_without_the_upper_ones():
    code = "import huatuo_jax.core.files, sys; print('jax' in sys.modules,"
    assert run(f"{code} 'huatuo_jax.api.models' in sys.modules)") == "False False\n"


def test_transformers_does_not_miss_torch_aloud():
    code = """
import sys
sys.modules["torch"] = None  # As where it is not installed.
import huatuo_jax, transformers
print(transformers.utils.is_torch_available())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "False\n", "")


def test_functions_are_not_hidden_by_the_modules_of_their_names():
    code = """
import huatuo_jax.sft, huatuo_jax.dpo, huatuo_jax.ppo.stage
import huatuo_jax as hj
from huatuo_jax.sft import run_sft
print(hj.sft.__module__, hj.dpo.__module__, hj.ppo.__module__, run_sft.__module__)
from huatuo_jax import reward, sft
print(reward.__name__, sft is hj.sft)
"""
    stages = "huatuo_jax.api.stages"
    assert run(code).splitlines() == [
        f"{stages} {stages} {stages} huatuo_jax.sft",
        "huatuo_jax.reward True",
    ]


def test_every_name_of_the_surface_is_there_and_told_to_type_checkers():
    assert set(hj.__all__) <= set(dir(hj))
    for name in hj.__all__:
        assert getattr(hj, name).__name__ == name
    tree = ast.parse(pathlib.Path(hj.__file__).read_text(encoding="utf-8"))
    (checked,) = (node for node in tree.body if isinstance(node, ast.If))
    told = [alias.name for node in checked.body for alias in node.names]
    assert sorted(told) == sorted(hj.__all__)
    assert (ROOT / "huatuo_jax" / "py.typed").is_file()
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = hj.nothing


@pytest.mark.parametrize(
    ("fields", "config", "given"),
    [
        (SamplingFields, SamplingConfig, set()),
        (SftFields, SftConfig, {"model", "data"}),
        (RewardFields, RewardConfig, {"model", "data"}),
        (DpoFields, DpoConfig, {"model", "data"}),
        (PpoFields, PpoConfig, {"model", "data", "reward"}),
    ],
)
def test_keywords_are_the_fields_of_the_config_with_their_types(fields, config, given):
    names = {field.name for field in dataclasses.fields(config)} - given
    types = get_type_hints(config)
    assert get_type_hints(fields) == {name: types[name] for name in names}
