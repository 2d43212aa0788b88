"""Every shell command of the README and of the pages: parsed by its own parser, run where it can.

What needs a network, a cloud, a container or an accelerator is named in `PARSED_ONLY` and `TOOLS`.
"""

import ast
import importlib
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from huatuo_jax import cli
from huatuo_jax.core.config import is_config
from huatuo_jax.data import SAMPLE_FOLDER
from tests.api import tiny
from tests.docs import pages

COMMANDS = pages.commands()
LAUNCHED = [one for one in COMMANDS if one.script and one.script.startswith("launch/")]
MEASURED = [one for one in COMMANDS if one.script and one.script.startswith("benchmarks/")]
TPU = [one for one in COMMANDS if one.words[0] == "launch/tpu/tpu.sh"]
HUB_ID = "Qwen/Qwen2.5-0.5B-Instruct"
RECIPE = "--config=configs/rlaif.py"

TOOLS = {
    "docker": "needs a container engine: its file is there, and the shell reads its words",
    "pip": "needs a network: its requirement is this package, with extras that there are",
    "ruff": "the continuous integration runs it",
    "mypy": "the continuous integration runs it",
    "mkdocs": "tests/docs/test_site.py builds the site",
    "pytest": "this is it: its folders are there",
    "tests.bucket_server": "a server of buckets, which tests/checkpoint/test_bucket.py asks",
    "venv": "the continuous integration makes one",
    "gcloud": "needs a cloud",
    "sky": "needs a cloud: tests/engines loads its task",
    "kubectl": "needs a cluster: tests/engines checks its manifest",
    "sbatch": "needs Slurm: tests/engines runs its script",
    "squeue": "needs Slurm",
    "scancel": "needs Slurm",
    "tail": "follows a file",
}

# What runs, in this order in one folder, with what makes it small. Beginnings are enough.
RUN = {
    f"launch/train.py {RECIPE} --workdir=runs/demo": (),  # `tiny_recipe` below.
    "launch/inspect_data.py my_dialogues.jsonl": (),
    "launch/train.py --config=configs/sft.py:my_dialogues.jsonl": ("--config.sft.num_steps=2",),
    "launch/generate.py --model=runs/demo/sft/model --prompts=runs/demo/held_out": (
        "--max_new_tokens=8",
    ),
    "launch/generate.py --model=runs/demo/sft/model --prompts=prompts.jsonl": (
        "--max_new_tokens=8",
    ),
    "launch/label.py --answers=answers.jsonl --output=labels.jsonl --judge=offline": (),
    "launch/train.py --config=configs/reward.py:": (
        "--config.reward.num_steps=2",
        "--config.reward.data.held_out.share=0.5",
    ),
    "launch/score.py": (),
    "launch/train.py --config=configs/ppo.py:": (
        "--config.ppo.num_iterations=1",
        "--config.ppo.rollout.num_prompts=4",
        "--config.ppo.rollout.max_new_tokens=8",
        "--config.ppo.optimizer.warmup_steps=0",
    ),
    "launch/train.py --config=configs/dpo.py:": (
        "--config.dpo.num_steps=2",
        "--config.dpo.data.held_out.share=0.5",
    ),
    "launch/convert.py --source=runs/demo/sft/model": (),
    "launch/convert.py --source=exported/sft": (),
    "launch/push.py": (),
    "launch/job.py --engine=skypilot": (),
    "launch/job.py --engine=kubernetes": (),
    "launch/job.py --engine=slurm": (),
}
PARSED_ONLY = {
    f"launch/train.py {RECIPE} --workdir=runs/another": "the recipe runs once",
    f"launch/train.py {RECIPE} --workdir=runs/biased": "the recipe runs once",
    f"launch/train.py {RECIPE} --workdir=runs/mine": "asks a judge's server",
    f"launch/train.py {RECIPE} --workdir=runs/two": "tests/multi_host runs two processes",
    "launch/train.py --config=configs/sft.py:gs://my-bucket/": "tests/training runs in a bucket",
    "launch/train.py --config=configs/huatuogpt_7b.py": "a model of 7 billion parameters",
    "launch/train.py --config=configs/huatuogpt_7b_lora.py": "a model of 7 billion parameters",
    "launch/train.py --config=configs/qwen3_0_6b.py": "downloads a model",
    "launch/label.py --answers=answers.jsonl --output=labels_of_a_model.jsonl": "asks a server",
    "launch/convert.py --source=baichuan-inc/Baichuan-7B": "downloads a model",
    "launch/convert.py --source=FreedomIntelligence/": "downloads a model",
    "launch/serve.py": "runs until it is stopped; tests/serving starts it",
    "launch/chat.py": "waits for questions; tests/test_chat.py talks to it",
    "launch/compile.py": "tests/compiling compiles small models; these take minutes",
}


def after_python(command):
    return " ".join(command.words[1:])


def name_of(script):
    """The command of the package that a file in `launch/` runs."""
    return re.search(r'cli\.run\("(\w+)"\)', (pages.ROOT / script).read_text(encoding="utf-8"))[1]


def test_every_command_is_one_that_is_known():
    for command in COMMANDS:
        program = pathlib.Path(command.words[0]).name
        known = command.script or command in TPU or program in TOOLS
        module = command.words[1:2] == ("-m",) and command.words[2] in TOOLS
        assert known or module, f"{command.page}: {command}"


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: page.stem)
def test_every_block_is_shell(page):
    for block in pages.blocks(page, "bash"):
        done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_every_command_is_run_or_named_as_one_that_is_not():
    for command in LAUNCHED:
        line = after_python(command)
        run = [start for start in RUN if line.startswith(start)]
        parsed = [start for start in PARSED_ONLY if line.startswith(start)]
        assert len(run) + bool(parsed) == 1, f"{command.page}: {command}"
    for start in (*RUN, *PARSED_ONLY):
        assert any(after_python(one).startswith(start) for one in LAUNCHED), f"{start} is nowhere"


@pytest.fixture(scope="module")
def base_model(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("base"), "lm", max_positions=512)


@pytest.fixture
def check_parsed(monkeypatch, capsys):
    """Checks that a command's own parser takes words, of which nothing is run."""

    def check(script, words):
        name, given = name_of(script), []
        command = cli.COMMANDS[name]
        module = importlib.import_module(f"huatuo_jax.{command.module}")
        monkeypatch.setattr(module, "main", lambda *values: given.extend(values))
        monkeypatch.setattr(sys, "argv", words)
        monkeypatch.chdir(pages.ROOT)
        cli.run(name)
        flags, *config = given
        assert isinstance(flags, getattr(module, command.flags)), capsys.readouterr().err
        assert [is_config(one) for one in config] == [True] * command.with_config

    return check


@pytest.mark.parametrize("command", LAUNCHED, ids=str)
def test_its_own_parser_takes_every_launched_command(command, base_model, check_parsed, bucket):
    words = [word.replace(HUB_ID, str(base_model)) for word in command.words[1:]]
    check_parsed(command.script, words)


@pytest.mark.parametrize("start", RUN)
def test_what_makes_a_command_small_is_taken_too(start, check_parsed):
    command, small = small_command(start)
    check_parsed(command.script, [*command.words[1:], *small])


def defined_flags(path, seen=()):
    """Names of the flags that a benchmark defines, and those of the benchmarks that it imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "").startswith("DEFINE_"):
            found.add(node.args[0].value)
        if isinstance(node, ast.ClassDef) and node.name == "Flags":
            found |= {one.target.id for one in node.body if isinstance(one, ast.AnnAssign)}
        names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module, *(one.name for one in node.names)]
        for name in names:
            other = path.parent / f"{name}.py"
            if other.is_file() and other not in (path, *seen):
                found |= defined_flags(other, (*seen, path))
    return found


@pytest.mark.parametrize("command", MEASURED, ids=str)
def test_every_benchmark_is_there_and_has_its_flags(command):
    known = defined_flags(pages.ROOT / command.script)
    for word in command.words[2:]:
        flag, equals, _ = word.removeprefix("--").partition("=")
        assert word.startswith("--") and equals and flag in known, f"{command.page}: {word}"


@pytest.mark.parametrize("command", TPU, ids=str)
def test_the_script_for_tpus_takes_its_commands(command, tmp_path):
    (tmp_path / "gcloud").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "gcloud").chmod(0o755)
    words = [command.words[0], command.words[1], "--dry_run", *command.words[2:]]
    done = subprocess.run(
        words,
        cwd=pages.ROOT,
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "gcloud compute tpus" in done.stdout, done.stderr


def test_pip_is_asked_for_extras_that_there_are():
    setup = (pages.ROOT / "setup.py").read_text(encoding="utf-8")
    (call,) = [
        node
        for node in ast.walk(ast.parse(setup))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setup"
    ]
    (extras,) = [one.value for one in call.keywords if one.arg == "extras_require"]
    known = {key.value for key in extras.keys}
    for page in pages.PAGES:
        for extra in re.findall(r"(?:'\.|huatuo_jax|`\.)\[(\w+)\]", pages.text_of(page)):
            assert extra in known, f"{page.name}: {extra}"
    for command in COMMANDS:
        if pathlib.Path(command.words[0]).name == "pip":
            options = {"install", "--quiet", "--no-compile", "--editable"}
            (what,) = [word for word in command.words[1:] if word not in options]
            assert what == "." or re.fullmatch(r"\.\[(\w+)\]", what)[1] in known


def test_files_of_containers_and_folders_of_tests_are_there():
    for command in COMMANDS:
        if command.words[0] == "docker":
            for place, word in enumerate(command.words):
                if word == "--file":
                    assert (pages.ROOT / command.words[place + 1]).is_file()
        if "pytest" in command.words:
            for word in command.words:
                assert not word.startswith("tests/") or (pages.ROOT / word).is_dir()


def test_the_site_is_built_with_options_that_its_builder_has():
    from mkdocs.__main__ import cli as builder

    found = [one.words for one in COMMANDS if one.words[0].endswith("mkdocs")]
    assert found
    for _, verb, *options in found:
        builder.commands[verb].make_context(verb, options)


def small_command(start):
    """A command of `RUN`, and the flags that make it small."""
    command = next(one for one in LAUNCHED if after_python(one).startswith(start))
    return command, RUN[start] or (tiny_recipe() if "--workdir=runs/demo" in start else ())


def tiny_recipe():
    """The flags that make the whole recipe small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(pages.ROOT / "benchmarks"))
        sizes = importlib.import_module("paper_claims_parts").TINY

    def flags(changes, prefix):
        for name, value in changes.items():
            if is_config(value):
                yield from flags(vars(value), f"{prefix}.{name}")
            else:
                yield f"--{prefix}.{name}={value}"

    return tuple(flags(sizes, "config"))


@pytest.mark.slow
def test_the_commands_run_one_after_the_other(tmp_path):
    for name in ("launch", "configs", "huatuo_jax"):
        (tmp_path / name).symlink_to(pages.ROOT / name)
    dialogues = SAMPLE_FOLDER / "real_instruction.jsonl"
    shutil.copy(dialogues, tmp_path / "my_dialogues.jsonl")
    rows = [json.loads(line) for line in dialogues.read_text(encoding="utf-8").splitlines()[:12]]
    asked = [{"id": row["id"], "messages": row["messages"][:1]} for row in rows]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    environment = os.environ | {"PYTHONPATH": str(pages.ROOT), "HF_HUB_OFFLINE": "1"}
    for start in RUN:
        command, small = small_command(start)
        done = subprocess.run(
            [sys.executable, *command.words[1:], *small],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{shlex.join(command.words)}\n{done.stdout}{done.stderr}"
    demo = tmp_path / "runs" / "demo"
    assert (demo / "report.html").is_file() and (demo / "export" / "release.json").is_file()
    assert (tmp_path / "runs" / "sft" / "sft" / "model").is_dir()
    assert len((tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()) == 12
    assert (tmp_path / "comparisons.jsonl").is_file() and (tmp_path / "scores.jsonl").is_file()
    assert (tmp_path / "runs" / "ppo" / "ppo" / "model").is_dir()
    assert (tmp_path / "runs" / "dpo" / "dpo" / "model").is_dir()
    assert (tmp_path / "exported" / "sft" / "config.json").is_file()
    assert (tmp_path / "imported" / "sft").is_dir()
