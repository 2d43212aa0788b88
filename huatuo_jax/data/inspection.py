"""Inspection of data files before training: counts, lengths, errors and samples.

    inspector = Inspector(template=by_name("huatuogpt"), tokenizer=tokenizer)
    reports = [inspector(path) for path in paths]
    print(complaint(reports, max_error_share=0.01))

No bad row stops an inspection: a file's faults are part of its report, and `complaint` decides
whether a run should use the files. `huatuo_jax.data.inspection_report` prints a report.
"""

import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from huatuo_jax.core.files import as_path, is_address
from huatuo_jax.data.batches import best_fit_rows
from huatuo_jax.data.chat.template import ChatTemplate
from huatuo_jax.data.files import Row, RowError, find_layout, read_rows
from huatuo_jax.data.formats.adapters import ADAPTERS, Adapter
from huatuo_jax.data.formats.dialogues import Family, Format, Terms, recognise
from huatuo_jax.data.formats.turns import RowLeftOut, RowProblem
from huatuo_jax.data.inspection_measures import Measurer, Sample, Tally, samples_of
from huatuo_jax.data.readers import ALL_FORMATS, Reading, ReadOptions, read_records
from huatuo_jax.data.records import Case, Comparison, Dialogue, ExamQuestion, Message, Record
from huatuo_jax.data.text import choose_encoding

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROWS_TRIED = 20  # with every adapter, to find those that fit
_PROGRESS_EVERY = 200  # records
_COMPLAINTS_SHOWN = 3

Path = str | os.PathLike[str]


class Distribution(NamedTuple):
    """The distribution of a size; a percentile is the smallest value with that share below it."""

    minimum: int
    mean: float
    p50: int
    p90: int
    p99: int
    maximum: int

    @classmethod
    def of(cls, sizes: Sequence[int]) -> "Distribution":
        """Returns the distribution of at least one size."""
        p50, p90, p99 = np.percentile(sizes, (50, 90, 99), method="inverted_cdf").tolist()
        return cls(min(sizes), float(np.mean(sizes)), p50, p90, p99, max(sizes))


class Packing(NamedTuple):
    """Best-fit packing of the dialogues that fit: rows and their fill, packed and not packed."""

    num_rows: int
    efficiency: float
    unpacked_efficiency: float


@dataclass(frozen=True, kw_only=True)
class FileReport:
    """The content of one file, or of several files of one family together.

    Attributes:
        name: the file, or the number of files.
        layout: the file's layout and encoding in words; None if they are not recognized.
        family: of its records; None if there are none.
        formats: used rows by the name of their format (after that of the adapter).
        kinds: dialogues by kind; None for dialogues without one.
        errors: the bad rows, all of them. `exclusions` and `repairs`: rows by reason.
        failure: the error that stopped reading the file; the counts are those up to there.
        known_formats: the formats to choose from, if no row is in a known one.
        fitting_adapters: adapters that would read the rows, if none was named.
        tally: the sizes of the records.
        samples: the first records, rendered as for a model.
    """

    name: str
    layout: str | None
    family: Family | None = None
    formats: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str | None] = field(default_factory=Counter)
    rows: int = 0
    records: int = 0
    errors: tuple[RowError, ...] = ()
    exclusions: Counter[str] = field(default_factory=Counter)
    repairs: Counter[str] = field(default_factory=Counter)
    failure: str | None = None
    known_formats: tuple[Format, ...] = ()
    fitting_adapters: tuple[Adapter, ...] = ()
    tally: Tally
    samples: tuple[Sample, ...] = ()

    def distributions(self) -> dict[str, Distribution]:
        """Returns the distribution of every measured size, by name."""
        sizes = self.tally.sizes
        return {name: Distribution.of(values) for name, values in sizes.items() if values}

    def packing(self) -> Packing | None:
        """Plans the packing of the dialogues; None if none fits."""
        lengths = np.asarray(self.tally.lengths_kept, np.int64)
        if not len(lengths):
            return None
        _, num_rows = best_fit_rows(lengths, self.tally.max_tokens)
        total, room = int(lengths.sum()), self.tally.max_tokens
        return Packing(num_rows, total / (num_rows * room), total / (len(lengths) * room))

    def to_json(self) -> dict[str, Any]:
        """Returns all fields, every bad row included."""
        packing = self.packing()
        return {
            "name": self.name,
            "layout": self.layout,
            "family": self.family,
            "formats": dict(self.formats),
            "kinds": {kind or "unknown": count for kind, count in self.kinds.items()},
            "rows": self.rows,
            "records": self.records,
            "errors": [asdict(error) for error in self.errors],
            "exclusions": dict(self.exclusions),
            "repairs": dict(self.repairs),
            "failure": self.failure,
            "fitting_adapters": [adapter.name for adapter in self.fitting_adapters],
            "sizes": {name: one._asdict() for name, one in self.distributions().items()},
            **self.tally.to_json(),
            "packing": packing and packing._asdict(),
            "samples": [sample.to_json() for sample in self.samples],
        }


@dataclass(frozen=True, kw_only=True)
class Inspector:
    """Reads files and reports on them.

    Attributes:
        template: renders the dialogues. `tokenizer`: tokenises them.
        max_tokens: the length limit of a dialogue.
        num_samples: number of records of each file that are rendered for the report.
        read: options of reading; `max_error_share` is for `complaint` only.
    """

    template: ChatTemplate
    tokenizer: "PreTrainedTokenizerBase"
    max_tokens: int = 2048
    num_samples: int = 1
    read: ReadOptions = field(default_factory=ReadOptions)

    def __post_init__(self) -> None:
        """Validates the limits, and that the tokenizer has the template's tokens."""
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}; it should be at least 1")
        if self.num_samples < 0:
            raise ValueError(f"num_samples is {self.num_samples}; it should be 0 or more")
        probe = (Message("user", "a"), Message("assistant", "b"))
        try:
            self.template.render(probe, self.tokenizer)
        except ValueError as error:
            raise ValueError(
                f"template {self.template.name!r} does not go with the tokenizer: {error}"
            ) from error

    def __call__(
        self, path: Path, *, on_progress: Callable[[int, int], None] | None = None
    ) -> FileReport:
        """Inspects a file; its errors are part of the report.

        Args:
            path: the file, folder, or name on the hub.
            on_progress: called regularly with the records done and their number.
        """
        tally = Tally(max_tokens=self.max_tokens)
        layout: str | None = None
        try:
            layout = _layout_of(path, self.read.encoding)
            reading = read_records(path, **vars(replace(self.read, max_error_share=1.0)))
        except ValueError as problem:
            return FileReport(name=str(path), layout=layout, failure=str(problem), tally=tally)
        records, failure = _take(reading)
        measure = Measurer(self.template, self.tokenizer, tally)
        for number, (line, record) in enumerate(records):
            if on_progress and number and number % _PROGRESS_EVERY == 0:
                on_progress(number, len(records))
            try:
                measure(record)
            except ValueError as problem:
                tally.refused.append(RowError(reading.file, line, str(problem)))
        return FileReport(
            name=reading.file,
            layout=layout,
            family=_family_of(record for _, record in records),
            formats=reading.formats,
            kinds=Counter(record.kind for _, record in records if isinstance(record, Dialogue)),
            rows=reading.rows,
            records=reading.records,
            errors=tuple(reading.errors),
            exclusions=reading.exclusions,
            repairs=reading.repairs,
            failure=failure,
            known_formats=reading.known if reading.unknown() else (),
            fitting_adapters=fitting_adapters(path, self.read),
            tally=tally,
            samples=samples_of(records, self.template, self.tokenizer, num=self.num_samples),
        )


def totals(reports: Sequence[FileReport]) -> list[FileReport]:
    """Returns one report of all files together for every family with more than one file."""
    together = []
    for family in dict.fromkeys(report.family for report in reports):
        members = [report for report in reports if report.family == family]
        if family is not None and len(members) > 1:
            together.append(_sum(members, family))
    return together


def complaint(reports: Sequence[FileReport], *, max_error_share: float) -> str | None:
    """Returns in one line why a run should not use these files; None if it may.

    A file is refused if it cannot be read, or if more than `max_error_share` of its rows are
    errors, as by the readers.
    """
    refused = [text for report in reports if (text := _complaint(report, max_error_share))]
    if len(refused) < 2:
        return refused[0] if refused else None
    shown = "; ".join(refused[:_COMPLAINTS_SHOWN])
    more = len(refused) - _COMPLAINTS_SHOWN
    rest = f"; and {more} more" if more > 0 else ""
    return f"{len(refused)} of {len(reports)} files should not be used as they are: {shown}{rest}"


def check_json_target(target: str | os.PathLike[str], files: Sequence[str]) -> None:
    """Checks the target file of the reports, before any work is done.

    Raises:
        ValueError: its folder does not exist, it is a folder, or it is an inspected file.
    """
    path = as_path(target)
    if path.is_dir() or not (is_address(path) or path.parent.is_dir()):
        raise ValueError(f"json is {str(target)!r}; it should be a file in a folder that exists")
    if path.resolve() in [as_path(file).resolve() for file in files]:
        raise ValueError(f"json is {str(target)!r}, a file to inspect; it would be written over")


def write_json(reports: Sequence[FileReport], target: str | os.PathLike[str]) -> None:
    """Writes the reports of all files, and their totals by family."""
    whole = {
        "files": [report.to_json() for report in reports],
        "totals": [report.to_json() for report in totals(reports)],
    }
    text = json.dumps(whole, ensure_ascii=False, indent=1)
    # Errors may quote halves of characters, which are not UTF-8.
    as_path(target).write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def _complaint(report: FileReport, max_error_share: float) -> str | None:
    if report.failure is not None:
        return report.failure
    if len(report.errors) <= max_error_share * report.rows:
        return None
    text = (
        f"{report.name}: {len(report.errors):,} of {report.rows:,} rows are bad, more than"
        f" max_error_share={max_error_share:g} allows"
    )
    if report.fitting_adapters:
        fitting = " or ".join(f"--adapter={adapter.name}" for adapter in report.fitting_adapters)
        return f"{text}; {fitting} fits its rows"
    return f"{text}; no row is in a known format" if report.known_formats else text


def _layout_of(path: Path, encoding: str | None) -> str:
    layout = find_layout(path, encoding)
    if layout == "hub":
        return "a data set on the hub"
    if layout == "datasets":
        return "parquet or Arrow"
    return f"{layout}, {choose_encoding(path, encoding).upper()}"


def _take(reading: Reading[Record]) -> tuple[list[tuple[int, Record]], str | None]:
    """Returns the records with their lines as far as the file can be read, and the error."""
    records: list[tuple[int, Record]] = []
    try:
        for record in reading:
            records.append((reading.line, record))
    except ValueError as problem:
        return records, str(problem)
    return records, None


def _family_of(records: Iterable[Record]) -> Family | None:
    first = next(iter(records), None)
    if first is None:
        return None
    names: dict[type[Record], Family] = {
        Dialogue: "dialogue",
        Comparison: "comparison",
        Case: "case",
        ExamQuestion: "exam",
    }
    return names[type(first)] if type(first) in names else "prompt"


def fitting_adapters(path: Path, options: ReadOptions) -> tuple[Adapter, ...]:
    """Returns the adapters that read most of the first rows, if none was named."""
    if options.adapter is not None or find_layout(path, options.encoding) == "hub":
        return ()
    try:
        first = list(
            itertools.islice(
                read_rows(path, split=options.split, encoding=options.encoding), _ROWS_TRIED
            )
        )
    except ValueError:  # The file breaks off early, which its report contains.
        return ()
    rows = [row for row in first if isinstance(row, Row)]
    return tuple(adapter for adapter in ADAPTERS if _fits(adapter, rows))


def _fits(adapter: Adapter, rows: Sequence[Row]) -> bool:
    given = bad = 0
    for item in adapter.rewrite(rows):
        if isinstance(item, Row):
            try:
                recognise(item.value, ALL_FORMATS).convert(item.value, Terms(file_name=""))
                given += 1
            except RowProblem:
                bad += 1
            except RowLeftOut:
                given += 1
        elif isinstance(item, RowError):
            bad += 1
    return given > bad


def _sum(reports: Sequence[FileReport], family: Family) -> FileReport:
    def added(counters: Iterable[Counter[Any]]) -> Counter[Any]:
        return sum(counters, Counter())

    tally = Tally(max_tokens=reports[0].tally.max_tokens)
    for report in reports:
        tally.add(report.tally)
    return FileReport(
        name=f"all {len(reports)} files of {family}s",
        layout=None,
        family=family,
        formats=added(report.formats for report in reports),
        kinds=added(report.kinds for report in reports),
        rows=sum(report.rows for report in reports),
        records=sum(report.records for report in reports),
        errors=tuple(itertools.chain.from_iterable(report.errors for report in reports)),
        exclusions=added(report.exclusions for report in reports),
        repairs=added(report.repairs for report in reports),
        tally=tally,
    )
