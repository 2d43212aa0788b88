"""The console command `huatuo`, with all commands as its subcommands."""

import difflib
import importlib
import os
import pathlib
import platform
import shutil
import sys
import textwrap
from typing import NamedTuple


class Command(NamedTuple):
    """A command, whose module is imported when it is run.

    Attributes:
        module: of `huatuo_jax`; its `main` takes the flags, and the config where there is one.
        does: one line for the list of all commands.
        flags: name of the dataclass of its flags, in that module.
        with_config: True where it takes `--config`.
        with_sections: True where flags of sections have the section's name, as `--judge.model`.
    """

    module: str
    does: str
    flags: str = "Flags"
    with_config: bool = False
    with_sections: bool = False


COMMANDS = {
    "train": Command(
        "recipe.recipe", "run the stages of a config, or the whole recipe", with_config=True
    ),
    "generate": Command("generation.bulk", "answer a file of prompts", "BulkConfig"),
    "label": Command("preferences.label", "have answers judged, and make comparisons"),
    "score": Command("reward.score_file", "score answers with a reward model", "ScoreConfig"),
    "convert": Command("convert", "convert a model between Hugging Face and Orbax"),
    "inspect": Command("inspect_data", "look into data files"),
    "compile": Command(
        "compiling.command", "compile a config for TPUs or GPUs without one", with_config=True
    ),
    "evaluate": Command(
        "evaluate", "compare models on exams, questions and consultations", with_sections=True
    ),
    "synthesize": Command("synthesize", "make training data by a teacher model"),
    "serve": Command(
        "serving.command",
        "serve models over HTTP, as OpenAI does, with a web page",
        with_sections=True,
    ),
    "chat": Command("chat", "talk to a model in the terminal"),
    "job": Command("engines", "write a run as a SkyPilot task, a JobSet or a Slurm script"),
    "push": Command("hub.push", "push a run to the Hugging Face Hub", "PushConfig"),
}


_LEAST_THREADS = 16
_HUGE_PAGES = "glibc.malloc.hugetlb"
_ON_REQUEST = "/sys/kernel/mm/transparent_hugepage/enabled"


def run(name: str, *, shown_as: str | None = None) -> None:
    """Runs a command with the process's arguments.

    Where Linux gives huge pages to those who ask, the process first starts anew with them.

    Args:
        name: of `COMMANDS`.
        shown_as: its name in help; None for the file that Python runs.
    """
    _ask_for_huge_pages()
    _make_threads_for_devices()
    from huatuo_jax.core import command_line

    command = COMMANDS[name]
    module = importlib.import_module(f"huatuo_jax.{command.module}")
    flags = getattr(module, command.flags)
    if not command.with_config:
        command_line.run(module.main, flags, name=shown_as, with_sections=command.with_sections)
        return
    from huatuo_jax.recipe import base_model

    command_line.run(
        module.main,
        flags,
        with_config=True,
        first=base_model.FIRST,
        adapt=base_model.adapted,
        name=shown_as,
    )


def main() -> None:
    """Runs the console command `huatuo COMMAND [FLAGS]`."""
    given = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if given in ("-h", "--help", "help"):
        print(_help(shutil.get_terminal_size().columns))
        return
    if given not in COMMANDS:
        near = difflib.get_close_matches(given, COMMANDS, n=1)
        right = f"did you mean {near[0]}?" if near else f"huatuo has {', '.join(COMMANDS)}"
        print(f"error: unknown command {given!r}; {right}", file=sys.stderr)
        sys.exit(1)
    del sys.argv[1]
    run(given, shown_as=f"huatuo {given}")


def _ask_for_huge_pages() -> None:
    """Starts the process anew with huge pages for large arrays, where glibc can ask Linux for them.

    A step on a CPU takes much of its memory anew and gives it back, and by pages of 4 KiB a tenth
    of its time goes into that. glibc reads the setting when a process starts, and one that the
    user made stays: `GLIBC_TUNABLES=glibc.malloc.hugetlb=0` does without.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    file = getattr(sys.modules["__main__"], "__file__", None)
    # A process that has loaded jax is not a command's own, and one without a file has read its
    # program from a pipe.
    if _HUGE_PAGES in tunables or "jax" in sys.modules or not (file and sys.executable):
        return
    try:
        on_request = "[madvise]" in pathlib.Path(_ON_REQUEST).read_text(encoding="ascii")
    except OSError:
        return
    if on_request and platform.libc_ver()[0] == "glibc":
        os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (tunables, f"{_HUGE_PAGES}=1")))
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _make_threads_for_devices() -> None:
    """Gives the devices that a CPU is divided into enough threads, before jax starts them.

    A device waits for the others in a thread. XLA makes as many as there are cores, and where all
    of them wait it aborts (jax 0.10). A number that the user set (`NPROC`) stays.
    """
    devices = os.environ.get("JAX_NUM_CPU_DEVICES", "")
    if devices.isdecimal() and int(devices) > 1:
        os.environ.setdefault("NPROC", str(max(2 * int(devices), _LEAST_THREADS)))


def _help(columns: int) -> str:
    """Lists all commands, in lines of so many columns."""
    usage = "usage: huatuo COMMAND [FLAGS]; huatuo COMMAND --help lists the flags of one"
    lines, width = [textwrap.fill(usage, columns), ""], max(map(len, COMMANDS))
    for name, command in COMMANDS.items():
        head, indent = f"  {name:{width}}  ", " " * (width + 4)
        lines.append(
            textwrap.fill(command.does, columns, initial_indent=head, subsequent_indent=indent)
        )
    return "\n".join(lines)
