import dataclasses
import os
import pathlib
from typing import Literal

import pytest

from huatuo_jax.core import command_line
from tests.called import call

ROOT = pathlib.Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Inner:
    """A section.

    Attributes:
        rate: how much.
    """

    rate: float = 0.5

    def __post_init__(self):
        if self.rate < 0:
            raise ValueError(f"rate={self.rate} must be 0 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needy:
    rank: int
    alpha: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """What it does.

    Attributes:
        model: which one.
        steps: how many.
    """

    model: str = "m"
    steps: int | None = None
    dry_run: bool = False
    overwrite: bool = True
    dtype: Literal["float32", "bfloat16"] | None = None
    names: tuple[str, ...] = ()
    sizes: tuple[int, ...] = (1, 2)
    inner: Inner = Inner()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checked:
    port: int = 0
    inner: Inner = Inner()

    def __post_init__(self):
        if self.port > 65535:
            raise ValueError(f"port={self.port} must be at most 65535")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needing:
    """Of files.

    Attributes:
        files: to read.
        output: to write.
    """

    files: command_line.Files
    output: str


def parse(*arguments, flags=Flags):
    return command_line.parse(flags, arguments, name="x")


@pytest.fixture
def run(capsys):
    """Runs a command with these arguments; gives its exit code and its error."""

    def run(main, *arguments, flags=Flags, **keywords):
        try:
            command_line.run(main, flags, arguments=arguments, name="x", **keywords)
            code = 0
        except SystemExit as end:
            code = end.code
        return code, capsys.readouterr().err

    return run


GIVEN = {
    "nothing": ((), {}),
    "equals": (("--model=a=b",), {"model": "a=b"}),
    "a space": (("--model", "-a"), {"model": "-a"}),
    "a hyphen in the name": (("--dry-run",), {"dry_run": True}),
    "one hyphen": (("-model=a",), {"model": "a"}),
    "a negated boolean": (("--nooverwrite", "--no_dry_run"), {"overwrite": False}),
    "a boolean's value": (("--dry_run=true", "--overwrite", "False"), {"dry_run": True}),
    "a boolean before a flag": (("--dry_run", "--model=a"), {"dry_run": True, "model": "a"}),
    "none": (("--steps=None", "--dtype=None"), {}),
    "a choice": (("--dtype=bfloat16",), {"dtype": "bfloat16"}),
    "commas": (("--names=a,b",), {"names": ("a", "b")}),
    "one after the other": (("--names", "a", "b,c", "--steps=3"), {"names": ("a", "b,c")}),
    "given again": (("--names=a", "--names=b"), {"names": ("a", "b")}),
    "an empty tuple": (("--sizes=",), {"sizes": ()}),
    "numbers": (("--sizes=3,4,5",), {"sizes": (3, 4, 5)}),
    "a field of a section": (("--rate=1",), {"inner": Inner(rate=1.0)}),
}


@pytest.mark.parametrize(("arguments", "changes"), GIVEN.values(), ids=GIVEN.keys())
def test_values_are_those_of_the_fields_types(arguments, changes):
    expected = dataclasses.replace(Flags(), **changes)
    if "--overwrite" in arguments or "--nooverwrite" in arguments:
        expected = dataclasses.replace(expected, overwrite=False)
    if "--steps=3" in arguments:
        expected = dataclasses.replace(expected, steps=3)
    assert parse(*arguments) == expected


WRONG = {
    "a misspelt name": (("--modle=a",), "unknown field --modle; did you mean --model?"),
    "nothing like it": (("--zzz=a",), "unknown field --zzz; see --help"),
    "a negated text": (("--nomodel",), "unknown field --nomodel; did you mean --model?"),
    "no number": (("--steps=many",), "--steps: .*many"),
    "half a number": (("--steps=1.5",), "--steps: .*1.5"),
    "none where it is not taken": (("--rate=None",), "--rate: .*None"),
    "no choice": (("--dtype=int8",), "invalid choice 'int8' for argument '--dtype'"),
    "no boolean": (("--dry_run=maybe",), "invalid choice 'Maybe' for argument '--dry_run'"),
    "no value": (("--model",), "--model needs a value"),
    "twice": (("--model=a", "--model=b"), "^--model is given twice$"),
    "a value the section refuses": (("--rate=-1",), "rate=-1.0 must be 0 or more"),
    "a stray one": (("stray",), "unexpected argument 'stray'; see --help"),
    "a section": (("--inner=3",), "--inner=3 is a section"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_flag_ends_in_one_line_that_names_it(run, arguments, message):
    code, error = run(lambda flags: None, *arguments)
    assert code == 1 and error.startswith("error: ") and error.count("\n") == 1
    with pytest.raises(ValueError, match=message):
        parse(*arguments)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--port=99999", "port=99999 must be at most 65535"),
        ("--rate=-1", "inner: rate=-1.0 must be 0 or more"),
    ],
)
def test_a_refused_value_is_told_without_the_name_of_a_class(argument, message):
    with pytest.raises(ValueError) as caught:
        parse(argument, flags=Checked)
    assert str(caught.value) == message


def test_files_stand_beside_the_flags_and_required_flags_are_named():
    found = parse("a", "--output=o", "b", flags=Needing)
    assert found == Needing(files=("a", "b"), output="o")
    with pytest.raises(ValueError, match="^no FILES given; see --help$"):
        parse("--output=o", flags=Needing)
    with pytest.raises(ValueError, match="^--output is missing; see --help$"):
        parse("a", flags=Needing)


def test_help_lists_all_flags_with_their_documentation(capsys):
    with pytest.raises(SystemExit) as end:
        parse("--help")
    text = capsys.readouterr().out
    assert end.value.code in (0, None)
    for expected in ("What it does.", "--model", "which one.", "--rate", "how much.", "--dry_run"):
        assert expected in text
    assert "Attributes:" not in text


CARD = """
import dataclasses
from huatuo_jax.ppo.config import PpoConfig
from tests.core.test_command_line import Flags, Inner, Needy

@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    '''Of the card.

    Attributes:
        top: the first.
        section: below.
        gone: not there.
        parts: several.
    '''
    top: int = 1
    section: Flags = Flags()
    there: Inner | None = Inner()
    gone: Needy | None = None
    parts: tuple[Inner, ...] = (Inner(), Inner(rate=2.0))

def get_config(text=""):
    return Config(section=Flags(model=text or "card"))
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workdir:
    """Of the command.

    Attributes:
        workdir: where.
    """

    workdir: str


@pytest.fixture
def card(tmp_path):
    (tmp_path / "card.py").write_text(CARD, encoding="utf-8")
    return str(tmp_path / "card.py")


def with_config(*arguments):
    return command_line.parse_with_config(Workdir, ["--workdir=w", *arguments], name="x")


def test_a_cards_fields_are_flags_with_the_values_of_the_card_as_defaults(card):
    flags, config = with_config(f"--config={card}")
    assert flags.workdir == "w" and config.section.model == "card"
    _, config = with_config("--config", f"{card}:mine", "--config.top=5", "--config.parts.1.rate=4")
    assert (config.section.model, config.top, config.parts[1].rate) == ("mine", 5, 4.0)
    _, config = with_config(f"--config={card}", "--config.section.names=a,b")
    assert config.section == Flags(model="card", names=("a", "b"))


def test_a_section_can_be_taken_away_and_made(card):
    _, config = with_config(f"--config={card}", "--config.there=None", "--config.gone.rank=3")
    assert config.there is None and config.gone == Needy(rank=3)
    with pytest.raises(ValueError, match="--config.gone.rank is missing"):
        with_config(f"--config={card}", "--config.gone.alpha=3")
    with pytest.raises(ValueError, match="--config.gone.rank: .*'x'"):
        with_config(f"--config={card}", "--config.gone.rank=x")
    with pytest.raises(ValueError, match="--config.there.rate: config.there=None has no fields"):
        with_config(f"--config={card}", "--config.there=None", "--config.there.rate=1")


WRONG_FIELDS = {
    "misspelt": ("--config.section.modle=a", "did you mean --config.section.model?"),
    "in another section": ("--config.model=a", "did you mean .*--config.section.model"),
    "in no section": ("--config.gone.size=1", "config.gone has rank, alpha"),
    "a section": ("--config.section=3", "--config.section=3 is a section; give its fields"),
    "a section that is needed": ("--config.section=None", "is a section; give its fields"),
    "refused": ("--config.there.rate=-1", "config.there: rate=-1.0 must be 0 or more"),
    "no number": ("--config.top=x", "--config.top: .*'x'"),
}


@pytest.mark.parametrize(("argument", "message"), WRONG_FIELDS.values(), ids=WRONG_FIELDS.keys())
def test_a_wrong_field_is_named(card, argument, message):
    with pytest.raises(ValueError, match=message):
        with_config(f"--config={card}", argument)


def test_help_beside_a_config_lists_all_of_its_fields(card, capsys):
    with pytest.raises(SystemExit):
        with_config(f"--config={card}", "--help")
    text = capsys.readouterr().out
    for expected in ("--workdir", "--config.top", "the first.", "--config.section.dry_run"):
        assert expected in text
    assert "--config.gone.rank" in text and "--config.parts.1.rate" in text
    with pytest.raises(SystemExit):
        with_config("--help")
    assert "--config=CARD" in capsys.readouterr().out


def test_two_cards_or_none_are_refused(card):
    with pytest.raises(ValueError, match="--config is missing"):
        with_config()
    with pytest.raises(ValueError, match="must be one card"):
        with_config(f"--config={card}", f"--config={card}")


def test_what_a_user_can_cause_ends_in_one_line(run):
    def main(flags):
        raise ValueError("size is 0;\n  it should be more")

    assert run(main) == (1, "error: size is 0; it should be more\n")


def test_our_own_bugs_keep_their_traceback(run):
    def main(flags):
        raise KeyError("ours")

    with pytest.raises(KeyError):
        run(main)


def test_only_a_terminal_has_a_width(monkeypatch):
    monkeypatch.setattr(command_line.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "72")
    monkeypatch.setenv("TERM", "xterm")
    assert command_line.terminal_width() == 72
    monkeypatch.setenv("TERM", "dumb")
    assert command_line.terminal_width() is None


def test_a_reader_that_goes_away_is_no_error(tmp_path, monkeypatch, run):
    with open(tmp_path / "out", "w") as out:
        monkeypatch.setattr(command_line.sys, "stdout", out)

        def main(flags):
            raise BrokenPipeError(32, "Broken pipe")

        code, error = run(main)
        assert (code, error) == (1, "") and os.fstat(out.fileno()).st_rdev != 0


def test_an_override_of_no_field_ends_in_one_line():
    card = ROOT / "configs" / "sft.py"
    done = call("train", f"--config={card}", "--workdir=x", "--config.sft.batchsize=3")
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line == (
        "error: unknown field --config.sft.batchsize; did you mean --config.sft.batch_size?"
    )
