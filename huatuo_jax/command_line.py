"""What every command shares: flags, one clear line for an error, the width of the terminal."""

import os
import shutil
import sys
from collections.abc import Callable
from typing import overload

from absl import app, flags, logging

from huatuo_jax import multi_host


@overload
def run(main: Callable[[], None]) -> None: ...


@overload
def run(main: Callable[[list[str]], None], *, positional: str) -> None: ...


def run(main: Callable[..., None], *, positional: str | None = None) -> None:
    """Run a command after its flags are parsed; what a user can cause ends in one line, code 1.

    Args:
        main: the command. Its ValueError and OSError are messages to the user; anything else is
            our bug and keeps its traceback.
        positional: what stands on the command line beside the flags, in a word such as FILES;
            `main` then takes the list of it, which is never empty.
    """

    def guarded(arguments: list[str]) -> None:
        given = arguments[1:]  # The first is the command's own name.
        if not flags.FLAGS["verbosity"].present:
            # Orbax and TFDS tell of every file they touch.
            logging.set_verbosity(logging.WARNING)
        try:
            if positional is None:
                if given:
                    raise ValueError(f"unexpected argument {given[0]!r}; see --help")
                main()
            else:
                if not given:
                    raise ValueError(f"no {positional} given; see --help")
                main(given)
        except BrokenPipeError:
            # The reader of the output has gone (`| head`); nothing is wrong, or left to say. Python
            # flushes standard output once more as it ends, which must not fail either.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except (ValueError, OSError) as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            sys.exit(1)
        finally:
            multi_host.leave()

    app.run(guarded, flags_parser=_parse_flags)


def _parse_flags(arguments: list[str]) -> list[str]:
    """Parse as absl does; an override of a config field that is not there ends in one line."""
    try:
        return app.parse_flags_with_usage(arguments)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        print(f"error: a flag cannot be taken: {' '.join(_text(error).split())}", file=sys.stderr)
        sys.exit(1)


def _text(error: BaseException) -> str:
    """What an error says, or the error that it was made of.

    A KeyError's own text is its argument's repr, line ends and quotes written as escapes.
    """
    (first, *more) = error.args or ("",)
    if isinstance(first, BaseException) and not more:
        return _text(first)
    return str(first if isinstance(error, KeyError) else error)


def terminal_width() -> int | None:
    """The columns of the terminal that standard output is; None where it is something else."""
    if not sys.stdout.isatty() or os.environ.get("TERM") == "dumb":
        return None
    return shutil.get_terminal_size().columns
