"""A wheel: all files of the package are in it, and it works where there is no checkout."""

import dataclasses
import importlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest

from huatuo_jax.core.config import cards, is_config
from tests.api.test_docs import blocks

ROOT = pathlib.Path(__file__).resolve().parents[1]
NEEDED = ("huatuo_jax", "configs", "LICENSE", "README.md", "pyproject.toml", "setup.py")

LIST_FILES = """
import json, pathlib, setuptools
from distutils.core import run_setup
build = run_setup("setup.py", stop_after="init").get_command_obj("build_py")
build.set_undefined_options = lambda *options: None
build.build_lib, build.force = "build", False
build.finalize_options()
modules = [file for _, _, file in build.find_all_modules()]
data = [f"{folder}/{name}" for _, folder, _, names in build.data_files for name in names]
print(json.dumps(sorted(modules + data)))
"""


def files_of_the_package():
    """All that stands in the package and among the cards, what Python caches apart."""
    found = [*(ROOT / "huatuo_jax").rglob("*"), *(ROOT / "configs").rglob("*")]
    return sorted(
        path.relative_to(ROOT).as_posix()
        for path in found
        if path.is_file() and "__pycache__" not in path.parts
    )


def run(*command, cwd, check=True, **environment):
    """Runs a command that sees nothing of the checkout."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [os.fspath(part) for part in command],
        cwd=cwd,
        env=kept | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def test_every_file_of_the_package_is_shipped():
    done = run(sys.executable, "-c", LIST_FILES, cwd=ROOT)
    assert sorted(set(json.loads(done.stdout.splitlines()[-1]))) == files_of_the_package()


class Installed:
    """An environment with this environment's libraries and, in place of its own, a built package.

    Attributes:
        python: its interpreter.
        huatuo: its console command.
    """

    def __init__(self, folder, *arguments):
        run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
        self.python, self.huatuo = folder / "bin" / "python", folder / "bin" / "huatuo"
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        packages = folder / "lib" / version / "site-packages"
        # A folder on the path, whose own .pth files, as of an editable checkout, are not read.
        (packages / "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        pip = (sys.executable, "-m", "pip", "--python", self.python, "install", "--no-deps")
        run(*pip, "--no-index", "--ignore-installed", *arguments, cwd=folder.parent)

    def has(self, expression, cwd):
        """The text of an expression over the package and its config module."""
        code = f"import huatuo_jax; from huatuo_jax.core import config; print({expression})"
        return run(self.python, "-c", code, cwd=cwd).stdout.strip()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The files of a checkout that a build needs, where it may leave what it makes."""
    folder = tmp_path_factory.mktemp("source")
    for name in NEEDED:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation")
    run(*pip, "--no-index", f"--wheel-dir={folder}", cwd=source)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    return Installed(tmp_path_factory.mktemp("environments") / "of_the_wheel", wheel)


@pytest.mark.slow
def test_a_wheel_holds_the_package_with_the_cards_inside(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    expected = [
        f"huatuo_jax/{name}" if name.startswith("configs/") else name
        for name in files_of_the_package()
    ]
    assert sorted(name for name in names if ".dist-info/" not in name) == sorted(expected)
    assert "huatuo_jax/py.typed" in names


@pytest.mark.slow
def test_an_installed_wheel_is_not_the_checkout(installed, tmp_path):
    package = pathlib.Path(installed.has("huatuo_jax.__file__", tmp_path)).resolve().parent
    assert package.is_relative_to(installed.python.parents[1].resolve())
    assert installed.has("config.cards()", tmp_path) == repr(cards())
    assert installed.has("config.load_card('rlaif').recipe", tmp_path) == "rlaif"


@pytest.mark.slow
def test_an_editable_install_has_the_command_and_the_cards_of_its_checkout(source, tmp_path):
    editable = Installed(tmp_path / "editable", "--no-build-isolation", "--editable", source)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert editable.has("huatuo_jax.__file__", empty) == f"{source / 'huatuo_jax'}/__init__.py"
    assert editable.has("config.load_card('rlaif').recipe", empty) == "rlaif"
    (source / "configs" / "new.py").write_text("")
    try:
        assert "'new'" in editable.has("config.cards()", empty)
    finally:
        (source / "configs" / "new.py").unlink()
    assert "train" in run(editable.huatuo, "--help", cwd=empty).stdout


@pytest.mark.slow
def test_the_console_command_lists_commands_flags_and_fields(installed, tmp_path):
    listed = run(installed.huatuo, "--help", cwd=tmp_path).stdout
    assert listed.startswith("usage: huatuo COMMAND") and "\n  inspect " in listed
    flags = run(installed.huatuo, "train", "--help", cwd=tmp_path).stdout
    assert "--workdir" in flags and "rlaif, sft" in flags
    fields = run(installed.huatuo, "train", "--config=rlaif", "--help", cwd=tmp_path).stdout
    for name in ("base_model", "judge.base_url", "sft.optimizer.learning_rate", "ppo.kl_coef"):
        assert f"--config.{name} " in fields
    wrong = run(installed.huatuo, "tran", cwd=tmp_path, check=False)
    assert (wrong.returncode, wrong.stderr) == (
        1,
        "error: unknown command 'tran'; did you mean train?\n",
    )
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def trained(installed, tmp_path_factory):
    """An empty folder in which the recipe ran at its smallest, and what the command printed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        sizes = importlib.import_module("paper_claims_parts").TINY
    folder = tmp_path_factory.mktemp("trained")
    # Somebody else's repository around the environment says nothing of the code in it.
    run("git", "init", "--quiet", installed.python.parents[2], cwd=folder)
    train = (installed.huatuo, "train", "--config=rlaif", "--workdir=runs/demo")
    return folder, run(*train, *as_flags(sizes), cwd=folder).stdout


def as_flags(changes, prefix="config"):
    """The flags that make these changes to a config."""
    found = []
    for name, value in changes.items():
        if is_config(value):
            found += as_flags(dataclasses.asdict(value), f"{prefix}.{name}")
        else:
            found.append(f"--{prefix}.{name}={value}")
    return found


@pytest.mark.slow
def test_an_installed_wheel_runs_the_recipe(trained):
    folder, told = trained
    demo = folder / "runs" / "demo"
    assert "rlaif: finished in runs/demo: " in told
    assert (demo / "report.html").stat().st_size > 0
    for start in json.loads((demo / "environment.json").read_text(encoding="utf-8"))["starts"]:
        assert start["packages"]["huatuo_jax"] and start["git_commit"] is None


@pytest.mark.slow
def test_an_installed_wheel_looks_at_data_and_converts_a_model_both_ways(
    installed, trained, tmp_path
):
    demo = trained[0] / "runs" / "demo"
    (data, *_) = sorted((demo / "clinic").glob("*conversation*.jsonl"))
    assert data.name in run(installed.huatuo, "inspect", data, cwd=tmp_path).stdout
    source = demo / "export" / "policy"
    run(installed.huatuo, "convert", f"--source={source}", "--target=ours", cwd=tmp_path)
    run(installed.huatuo, "convert", "--source=ours", "--target=theirs", cwd=tmp_path)
    (weights,) = source.glob("*.safetensors")
    assert (tmp_path / "theirs" / weights.name).read_bytes() == weights.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "theirs"]


@pytest.mark.slow
def test_the_python_surface_of_an_installed_wheel_answers_scores_and_saves(
    installed, trained, tmp_path
):
    page = blocks()
    (last,) = [number for number, block in enumerate(page) if "model.save(" in block]
    lines = "".join(page[: last + 1])
    for name in ("hj.load_model(", ".chat(", ".generate(", ".log_probs(", ".score(", ".save("):
        assert name in lines
    script = tmp_path / "page.py"
    script.write_text(f"import huatuo_jax as hj\n{lines}", encoding="utf-8")
    run(installed.python, script, cwd=trained[0])
    assert (trained[0] / "exported" / "policy" / "config.json").is_file()


def test_the_pythons_that_are_named_are_those_that_the_workflow_tests():
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8")
    named = re.findall(r'"Programming Language :: Python :: (\d\.\d+)"', setup)
    (tested,) = re.findall(r"^ +python: \[(.+)\]$", workflow, re.MULTILINE)
    assert named == re.findall(r"\d\.\d+", tested)
    assert f'python_requires=">={named[0]}"' in setup
