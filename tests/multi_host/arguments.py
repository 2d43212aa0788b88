"""The arguments of a script that processes of a test run."""

import dataclasses

from huatuo_jax.core import command_line


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What stands on its command line."""

    arguments: command_line.Files


def run(main):
    """Runs a function of the arguments as the project's commands are run."""
    command_line.run(lambda given: main(list(given.arguments)), Arguments)
