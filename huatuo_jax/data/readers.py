"""Readers of data files: a file goes in, records come out, and every row is accounted for.

    reading = read_dialogues("talks.jsonl", kind="real_conversation")
    dialogues = list(reading)
    print(reading.summary())

Each row of the source becomes records, an error (file, line, reason), or a row left out under a
named reason; `rows == rows_used + len(errors) + exclusions.total()` always holds.

`DialogueSource` names the dialogue files of a run for the mixture.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, Literal, NamedTuple, TypedDict, TypeVar, Unpack, cast

from huatuo_jax.core.files import as_path, open_binary
from huatuo_jax.data.files import Row, RowError, find_layout, read_rows
from huatuo_jax.data.formats.adapters import Adapter, LeftOut, find_adapter
from huatuo_jax.data.formats.dialogues import (
    CASE_FORMATS,
    DIALOGUE_FORMATS,
    EXAM_FORMATS,
    PROMPT_FORMATS,
    Converted,
    Family,
    Format,
    Terms,
    describe,
    recognise,
)
from huatuo_jax.data.formats.preferences import COMPARISON_FORMATS
from huatuo_jax.data.formats.turns import MAX_TURN_CHARS, RowLeftOut, RowProblem
from huatuo_jax.data.records import (
    KINDS,
    Case,
    Comparison,
    Dialogue,
    ExamQuestion,
    Kind,
    Messages,
    Prompt,
    Record,
)
from huatuo_jax.data.text import checked_encoding

FORMATS: dict[Family, tuple[Format, ...]] = {
    "comparison": COMPARISON_FORMATS,
    "exam": EXAM_FORMATS,
    "case": CASE_FORMATS,
    "dialogue": DIALOGUE_FORMATS,
    "prompt": PROMPT_FORMATS,
}
# In the order of how much they ask for: a comparison also looks like a prompt.
ALL_FORMATS: tuple[Format, ...] = tuple(one for formats in FORMATS.values() for one in formats)

NO_FORMAT = "no known format"
REPEATED_PROMPT = "prompt that stood before, word for word"
_JUDGED_FROM_ROW = 10_000
_ERRORS_SHOWN = 5
_COUNTS_SHOWN = 10

RecordT = TypeVar("RecordT", bound=Record, covariant=True)


class Used(NamedTuple):
    """A row that gave records, or (without records) a part of one."""

    file: str
    line: int
    format_name: str
    converted: Converted


Outcome = Used | RowError | LeftOut


class Keywords(TypedDict, total=False):
    """The keywords of every reader; `ReadOptions` documents them."""

    source: str | None
    kind: Kind | None
    adapter: str | Adapter | None
    split: str
    encoding: str | None
    max_turn_chars: int
    max_error_share: float
    empty_answers: bool


@dataclass(frozen=True)
class ReadOptions:
    """Options of reading a source.

    Attributes:
        source: the source's name in the records; by default the row's own, or the file's name.
        kind: the kind of all dialogues; by default the row's own, if it has one.
        adapter: the name of an adapter (or an adapter) for a source that is not in a common format.
        split: the part of parquet, Arrow or hub data to read.
        encoding: of text files, by Python's name; None detects it (`huatuo_jax.data.text`).
        max_turn_chars: a longer turn makes its row an error.
        max_error_share: reading stops when more than this share of the rows are errors. It is
            checked at the end, and from row 10,000 on also at each error.
        empty_answers: accept dialogues whose last answer is empty, for scoring, not training.
    """

    source: str | None = None
    kind: Kind | None = None
    adapter: str | Adapter | None = None
    split: str = "train"
    encoding: str | None = None
    max_turn_chars: int = MAX_TURN_CHARS
    max_error_share: float = 0.01
    empty_answers: bool = False

    def __post_init__(self) -> None:
        """Validates kind, adapter, encoding and limits."""
        if self.kind is not None and self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}; it should be one of {', '.join(KINDS)}")
        if self.max_turn_chars < 1:
            raise ValueError(f"max_turn_chars is {self.max_turn_chars}; it should be at least 1")
        if not 0 <= self.max_error_share <= 1:
            raise ValueError(
                f"max_error_share is {self.max_error_share}; it should lie between 0 and 1"
            )
        self.chosen_adapter()
        checked_encoding(self.encoding)

    def chosen_adapter(self) -> Adapter | None:
        """Returns the adapter, looked up if it was given by name."""
        return find_adapter(self.adapter) if isinstance(self.adapter, str) else self.adapter


@dataclass
class Reading(Generic[RecordT]):
    """One source: iterate it for its records; the counts are those of the latest pass.

    Attributes:
        rows: rows read. `rows_used`: those that gave records, or a part of one.
        records: records given. `formats`: used rows by the name of their format.
        errors: rows that could not be read. `exclusions`: rows left out, by reason.
        repairs: rows that gave a record after a repair, by the kind of repair.
        known: the formats that its rows may have. `line`: of the latest record's row; `place`: the
            same with the name of its file, of which a folder has several.

    Raises:
        ValueError: on iteration, when the file as a whole cannot be read, holds no rows, or too
            many of its rows are errors.
    """

    file: str
    outcomes: Callable[[], Iterator[Outcome]]
    max_error_share: float
    known: tuple[Format, ...] = ()
    line: int = 0
    place: str = ""
    rows: int = 0
    rows_used: int = 0
    records: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    errors: list[RowError] = field(default_factory=list)
    exclusions: Counter[str] = field(default_factory=Counter)
    repairs: Counter[str] = field(default_factory=Counter)

    def __iter__(self) -> Iterator[RecordT]:
        """Reads the source from its start."""
        self.rows = self.rows_used = self.records = 0
        self.formats, self.exclusions, self.repairs = Counter(), Counter(), Counter()
        self.errors = []
        for outcome in self.outcomes():
            self.rows += 1
            if isinstance(outcome, RowError):
                self.errors.append(outcome)
                if self.rows >= _JUDGED_FROM_ROW:
                    self._judge()
            elif isinstance(outcome, LeftOut):
                self.exclusions[outcome.reason] += 1
            else:
                converted = outcome.converted
                self.rows_used += 1
                self.formats[outcome.format_name] += 1
                self.repairs.update(converted.repairs)
                self.records += len(converted.records)
                self.line, self.place = outcome.line, f"{outcome.file}:{outcome.line}"
                yield from cast(tuple[RecordT, ...], converted.records)
        self._judge()
        assert self.rows == self.rows_used + len(self.errors) + self.exclusions.total()

    def _judge(self) -> None:
        if not self.rows:
            raise ValueError(f"{self.file}: holds no rows")
        if len(self.errors) > self.max_error_share * self.rows:
            shown = "".join(f"\n  {error}" for error in self.errors[:_ERRORS_SHOWN])
            more = len(self.errors) - _ERRORS_SHOWN
            raise ValueError(
                f"{self.file}: {len(self.errors)} of {self.rows} rows are bad, more than"
                f" max_error_share={self.max_error_share:g} allows:{shown}"
                + (f"\n  and {more} more" if more > 0 else "")
                + (f"\n  known formats: {self._known_formats()}" if self.unknown() else "")
            )

    def _known_formats(self) -> str:
        names = ", ".join(one.name for one in self.known)
        return f"{names} (`huatuo inspect` says what each looks like)"

    def unknown(self) -> bool:
        """Returns whether no row was used, some of them because no format is known."""
        return not self.rows_used and any(error.reason.endswith(NO_FORMAT) for error in self.errors)

    def summary(self) -> str:
        """Returns the counts of the latest pass, in one line."""
        parts = [f"{self.rows} rows ({_counts(self.formats)})", f"{self.records} records"]
        parts.append(f"{len(self.errors)} errors")
        parts += [f"left out: {_counts(self.exclusions)}"] if self.exclusions else []
        parts += [f"mended: {_counts(self.repairs)}"] if self.repairs else []
        return f"{self.file}: {'; '.join(parts)}"


def read_dialogues(path: str | os.PathLike[str], **keywords: Unpack[Keywords]) -> Reading[Dialogue]:
    """Reads dialogues in any of `DIALOGUE_FORMATS`; `ReadOptions` documents the keywords.

    Raises:
        ValueError: there is no such file or adapter, or an option is out of range; on iteration,
            see `Reading`.
    """
    return _reading(path, "dialogue", ReadOptions(**keywords))


def read_comparisons(
    path: str | os.PathLike[str], **keywords: Unpack[Keywords]
) -> Reading[Comparison]:
    """Reads preference pairs; a ranked or scored list gives all its pairs."""
    return _reading(path, "comparison", ReadOptions(**keywords))


def read_cases(path: str | os.PathLike[str], **keywords: Unpack[Keywords]) -> Reading[Case]:
    """Reads medical cases with their diagnoses; otherwise as `read_dialogues`."""
    return _reading(path, "case", ReadOptions(**keywords))


def read_exams(path: str | os.PathLike[str], **keywords: Unpack[Keywords]) -> Reading[ExamQuestion]:
    """Reads multiple-choice questions; otherwise as `read_dialogues`."""
    return _reading(path, "exam", ReadOptions(**keywords))


def read_prompts(path: str | os.PathLike[str], **keywords: Unpack[Keywords]) -> Reading[Prompt]:
    """Reads prompts, which end with the user, each id once; otherwise as `read_dialogues`.

    Answers and labels are joined to prompts by id, so one id with two texts is an error; a repeated
    prompt is left out.
    """
    reading: Reading[Prompt] = _reading(path, "prompt", ReadOptions(**keywords))
    outcomes = reading.outcomes
    reading.outcomes = lambda: _ids_once(reading.file, outcomes())
    return reading


def read_records(path: str | os.PathLike[str], **keywords: Unpack[Keywords]) -> Reading[Record]:
    """Reads records of the family of the first recognized row; otherwise as `read_dialogues`.

    For inspecting files; training names the family that it expects.
    """
    return _reading(path, None, ReadOptions(**keywords))


def _reading(
    path: str | os.PathLike[str], family: Family | None, options: ReadOptions
) -> Reading[RecordT]:
    # A missing or unreadable file is an error here and not at the first record.
    find_layout(path, options.encoding)
    return Reading(
        file=str(path),
        outcomes=lambda: outcomes_of(path, family, options),
        max_error_share=options.max_error_share,
        known=FORMATS[family] if family else ALL_FORMATS,
    )


def outcomes_of(
    path: str | os.PathLike[str], family: Family | None, options: ReadOptions
) -> Iterator[Outcome]:
    """Yields the outcome of each row of a source, in order; `Reading` counts these."""
    terms = Terms(
        file_name=pathlib.Path(path).stem,
        source=options.source,
        kind=options.kind,
        max_turn_chars=options.max_turn_chars,
        empty_answers=options.empty_answers,
    )
    rows: Iterable[Row | RowError | LeftOut] = read_rows(
        path, split=options.split, encoding=options.encoding
    )
    adapter = options.chosen_adapter()
    if adapter is not None:
        rows = _adapted(cast(Iterable[Row | RowError], rows), adapter)
    last_format: Format | None = None
    for row in rows:
        if not isinstance(row, Row):
            yield row
            continue
        try:
            last_format = _format_of(row.value, family, last_format)
            family = family or last_format.family
            converted = last_format.convert(row.value, terms)
        except RowProblem as problem:
            yield RowError(row.file, row.line, str(problem))
        except RowLeftOut as reason:
            yield LeftOut(row.line, str(reason))
        else:
            name = last_format.name if adapter is None else f"{adapter.name}: {last_format.name}"
            mended = tuple(dict.fromkeys((*row.mended, *converted.repairs)))
            yield Used(row.file, row.line, name, dataclasses.replace(converted, repairs=mended))


def _adapted(
    rows: Iterable[Row | RowError], adapter: Adapter
) -> Iterator[Row | RowError | LeftOut]:
    """Yields the rewritten rows; ValueError for an adapter that loses a row silently."""
    taken = given = 0

    def counted() -> Iterator[Row | RowError]:
        nonlocal taken
        for row in rows:
            taken += 1
            yield row

    for item in adapter.rewrite(counted()):
        given += 1
        yield item
    if taken != given:
        raise ValueError(
            f"adapter {adapter.name} took {taken} rows and accounts for {given}; it should give a"
            " row, an error or a reason to leave it out for each"
        )


def _format_of(row: object, family: Family | None, last_format: Format | None) -> Format:
    formats = FORMATS[family] if family else ALL_FORMATS
    try:
        return recognise(row, formats)
    except RowProblem:
        if last_format is not None:
            raise RowProblem(
                f"missing keys: {describe(row)}, while rows before were {last_format.name!r}"
                f" ({last_format.keys})"
            ) from None
        for other in ALL_FORMATS:
            if other.family != family and other.matches(row):
                raise RowProblem(
                    f"{describe(row)} looks like {other.name!r}, a {other.family}, not like a"
                    f" {family}"
                ) from None
        # Without the list of formats, which would be repeated in the message of every row.
        raise RowProblem(f"{describe(row)}, {NO_FORMAT}") from None


def _ids_once(file: str, outcomes: Iterable[Outcome]) -> Iterator[Outcome]:
    seen: dict[str, tuple[int, Messages]] = {}
    for outcome in outcomes:
        if not isinstance(outcome, Used):
            yield outcome
            continue
        prompt = cast(Prompt, outcome.converted.records[0])
        line, messages = seen.setdefault(prompt.id, (outcome.line, prompt.messages))
        if line == outcome.line:
            yield outcome
        elif messages == prompt.messages:
            yield LeftOut(outcome.line, REPEATED_PROMPT)
        else:
            reason = f"id {prompt.id!r} stood in line {line}, over another prompt"
            yield RowError(file, outcome.line, reason)


def _counts(counter: Counter[str]) -> str:
    shown = [f"{name} {count}" for name, count in counter.most_common(_COUNTS_SHOWN)]
    more = len(counter) - _COUNTS_SHOWN
    return ", ".join(shown + ([f"and {more} more"] if more > 0 else [])) or "none"


HeldOutBy = Literal["hash", "never", "always"]

_BLOCK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class DialogueSource:
    """One or more files that are one source.

    Attributes:
        name: in the mixture and the reports.
        paths: files, folders or hub names, see `huatuo_jax.data.readers.read_dialogues`.
        reading: the reader's keywords, as `{"kind": "real_instruction"}`.
        held_out_by: the held-out dialogues: by the common hash, none, or all (a held-out file).
    """

    name: str
    paths: tuple[str, ...]
    reading: Keywords = field(default_factory=Keywords)
    held_out_by: HeldOutBy = "hash"

    def __post_init__(self) -> None:
        """Refuses a source without files."""
        if not self.paths:
            raise ValueError(f"sources.{self.name}.paths: no file, it should name at least one")

    def readings(self) -> Iterator[Reading[Dialogue]]:
        """Yields one reading a path, not yet begun."""
        for path in self.paths:
            yield read_dialogues(path, **self.reading)

    @property
    def identity(self) -> dict[str, object]:
        """All inputs of its dialogues: the files' names and content, and the options of reading."""
        reading = {
            name: value.name if isinstance(value, Adapter) else value
            for name, value in self.reading.items()
        }
        return {
            "name": self.name,
            "files": [[pathlib.Path(path).name, content_hash(path)] for path in self.paths],
            "reading": reading,
            "held_out_by": self.held_out_by,
        }


def source_names(paths: Sequence[str]) -> list[str]:
    """Names the source of each file: by its name and as much of its path as makes it unique.

    `a/train.jsonl` and `b/train.jsonl` are `a/train` and `b/train`.
    """
    files = [as_path(path) for path in paths]
    names = [file.stem for file in files]
    parents = [f"{file.parent.name}/{file.stem}" for file in files]
    for finer in ([file.name for file in files], parents, [str(path) for path in paths]):
        counts = Counter(names)
        if max(counts.values(), default=1) == 1:
            break
        finer_counts = Counter(finer)
        names = [
            fine if counts[name] > 1 and finer_counts[fine] == 1 else name
            for name, fine in zip(names, finer, strict=True)
        ]
    return names


def content_hash(path: str | os.PathLike[str]) -> str:
    """Hashes a file's bytes, all files of a folder, or the rows of a hub data set."""
    whole = hashlib.sha256()
    place = as_path(path)
    if place.is_file():
        _update_with_file(whole, place)
    elif place.is_dir():
        for file in sorted(place.rglob("*")):
            if file.is_file():
                whole.update(str(file.relative_to(place)).encode() + b"\0")
                _update_with_file(whole, file)
    else:  # A name on the hub does not determine the content, so the rows are hashed.
        for row in read_rows(path):
            value = row.value if isinstance(row, Row) else str(row)
            whole.update(json.dumps(value, sort_keys=True, default=str).encode())
    return whole.hexdigest()[:32]


def _update_with_file(whole: "hashlib._Hash", path: pathlib.Path) -> None:
    with open_binary(path) as file:
        while block := file.read(_BLOCK):
            whole.update(block)
