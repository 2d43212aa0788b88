"""The console command: its list of commands, names that are none, and what it imports."""

import dataclasses
import importlib
import os
import pathlib
import platform
import subprocess
import sys
import typing

import pytest

from huatuo_jax import cli
from huatuo_jax.core import config

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture
def huatuo(monkeypatch, capsys):
    """Runs the console command in this process; gives its exit code, output and error."""

    def run(*arguments, columns=80):
        monkeypatch.setattr(sys, "argv", ["huatuo", *arguments])
        monkeypatch.setenv("COLUMNS", str(columns))
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize("columns", [40, 80])
@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",), ("help",)])
def test_the_list_of_commands_fits_the_terminal(huatuo, arguments, columns):
    code, out, err = huatuo(*arguments, columns=columns)
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= columns
    assert [line.split()[0] for line in out.splitlines() if line.startswith("  ")][0] == "train"
    for name, command in cli.COMMANDS.items():
        assert f"\n  {name} " in out and command.does in " ".join(out.split())


@pytest.mark.parametrize("columns", [40, 80])
@pytest.mark.parametrize("name", ["train", "inspect"])
def test_the_help_of_a_command_fits_the_terminal(huatuo, name, columns):
    code, out, err = huatuo(name, "--help", columns=columns)
    assert (code, err) == (0, "")
    (usage,) = [line for line in out.splitlines() if line.startswith("usage: ")]
    assert usage.startswith(f"usage: huatuo {name} ")
    assert max(len(line) for line in out.splitlines() if line != usage) <= columns


WRONG = {
    "a letter short": ("tran", "did you mean train?"),
    "the name of its file": ("inspect_data", "did you mean inspect?"),
    "nothing like one": ("zzz", "huatuo has train, generate, label, score, convert, inspect"),
    "a flag": ("--config=rlaif", "huatuo has train, "),
}


@pytest.mark.parametrize(("given", "right"), WRONG.values(), ids=WRONG.keys())
def test_a_command_that_there_is_not_is_answered_with_one_that_is(huatuo, given, right):
    code, out, err = huatuo(given)
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert err.startswith(f"error: unknown command {given!r}; {right}")


def imported_by(*arguments):
    """The libraries that a command has imported when it ends."""
    code = (
        "import sys\n"
        f"sys.argv = {['huatuo', *arguments]!r}\n"
        "try:\n    from huatuo_jax import cli\n    cli.main()\n"
        "finally:\n    print('\\n' + ' '.join(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("arguments", [(), ("tran",)])
def test_the_list_of_commands_waits_for_no_library(arguments):
    heavy = {"jax", "numpy", "transformers", "tyro", "absl", "torch"}
    assert not heavy & imported_by(*arguments)


HUGE_PAGES_OF_A_SCRIPT = """
import os, sys
from huatuo_jax import cli
cli._ON_REQUEST = sys.argv[1]
if sys.argv[2] == "jax":
    sys.modules["jax"] = sys
cli._ask_for_huge_pages()
print(os.environ.get("GLIBC_TUNABLES"), sys.argv[2], os.getpid())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="huge pages are asked for by glibc")
@pytest.mark.parametrize(
    ("kernel", "given", "loaded", "found"),
    [
        ("always [madvise] never", None, "nothing", "glibc.malloc.hugetlb=1"),
        (
            "always [madvise] never",
            "glibc.malloc.check=1",
            "nothing",
            "glibc.malloc.check=1:glibc.malloc.hugetlb=1",
        ),
        (
            "always [madvise] never",
            "glibc.malloc.hugetlb=0",
            "nothing",
            "glibc.malloc.hugetlb=0",
        ),
        ("always [madvise] never", None, "jax", "None"),
        ("[always] madvise never", None, "nothing", "None"),
        (None, None, "nothing", "None"),
    ],
)
def test_a_command_has_huge_pages_where_linux_gives_them_on_request(
    tmp_path, kernel, given, loaded, found
):
    if kernel is not None:
        (tmp_path / "enabled").write_text(kernel)
    script = tmp_path / "a script.py"
    script.write_text(HUGE_PAGES_OF_A_SCRIPT)
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    if given is not None:
        environment["GLIBC_TUNABLES"] = given
    process = subprocess.Popen(
        [sys.executable, script, tmp_path / "enabled", loaded],
        env=environment | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    output, _ = process.communicate(timeout=300)
    # The same process, with the same arguments, whether it started anew or not.
    assert output.splitlines() == [f"{found} {loaded} {process.pid}"]


@pytest.mark.parametrize(
    ("devices", "given", "found"),
    [
        ("2", None, "16"),
        ("12", None, "24"),
        ("2", "5", "5"),
        ("1", None, None),
        (None, None, None),
        ("two", None, None),  # jax says what is wrong with it.
    ],
)
def test_devices_of_a_cpu_have_threads_to_wait_in(monkeypatch, devices, given, found):
    for name, value in (("JAX_NUM_CPU_DEVICES", devices), ("NPROC", given)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    cli._make_threads_for_devices()
    assert os.environ.get("NPROC") == found


def test_the_help_of_training_does_not_import_torch():
    found = imported_by("train", "--help")
    assert "jax" in found and "torch" not in found


@pytest.fixture
def in_tmp_path(tmp_path, monkeypatch):
    """An empty folder, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _flags_of_strings(settings, start=""):
    """Names of the flags that take plain strings, which may be paths; of sections too."""
    hints = typing.get_type_hints(settings if isinstance(settings, type) else type(settings))
    marked = typing.get_type_hints(
        settings if isinstance(settings, type) else type(settings), include_extras=True
    )
    for field in dataclasses.fields(settings):
        hint = hints[field.name]
        kinds = {hint, *typing.get_args(hint)}
        value = field.default if isinstance(settings, type) else getattr(settings, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield from _flags_of_strings(value, f"{start}{field.name}.")
        elif "files" == field.name and not start:
            yield ""
        elif kinds & {str, tuple[str, ...]} and "no path" not in str(marked[field.name]):
            yield f"--{start}{field.name}="


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("gs://nowhere/run", "there is no such bucket"),
        ("https://host/run", "is an address on the web"),
    ],
)
@pytest.mark.parametrize("name", cli.COMMANDS)
def test_an_address_is_looked_for_before_all_else(huatuo, bucket, name, address, told, in_tmp_path):
    command = cli.COMMANDS[name]
    flags = getattr(importlib.import_module(f"huatuo_jax.{command.module}"), command.flags)
    first = ["--config=sft:data.jsonl"] if command.with_config else []
    asked = list(_flags_of_strings(flags))
    assert asked
    for flag in asked:
        if "." in flag and not command.with_sections:
            flag = f"--{flag.rpartition('.')[2]}"
        code, out, err = huatuo(name, *first, f"{flag}{address}")
        assert code == 1 and err.count("\n") == 1, (flag, out, err)
        assert address in err and told in err, (flag, err)
    assert list(in_tmp_path.iterdir()) == []


@pytest.mark.parametrize("card", ["rlaif", "sft:data.jsonl", "ppo"])
def test_an_address_in_any_field_of_a_card_is_looked_for(huatuo, bucket, card, in_tmp_path):
    start = ["train", f"--config={card}", "--workdir=run"]
    fields = list(_flags_of_strings(config.load_card(card), "config."))
    assert fields
    for field in fields:
        code, _, err = huatuo(*start, f"{field}gs://nowhere/x")
        assert code == 1 and "gs://nowhere/x: there is no such bucket" in err, (field, err)
    assert list(in_tmp_path.iterdir()) == []


def test_an_address_in_the_arguments_of_a_card_is_looked_for(huatuo, bucket, in_tmp_path):
    code, _, err = huatuo("train", "--config=sft:gs://nowhere/data.jsonl", "--workdir=run")
    assert code == 1 and "gs://nowhere/data.jsonl: there is no such bucket" in err
    assert list(in_tmp_path.iterdir()) == []
