"""The console command `huatuo`, with all commands as its subcommands."""

import difflib
import importlib
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


def run(name: str, *, shown_as: str | None = None) -> None:
    """Runs a command with the process's arguments.

    Args:
        name: of `COMMANDS`.
        shown_as: its name in help; None for the file that Python runs.
    """
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
