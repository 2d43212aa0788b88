"""Inspections as text: tables and colour for a terminal, plain aligned lines elsewhere.

A sample is shown in three columns: the role, the kind of the tokens (`trained`, `special`), and the
text. The kind has a column of its own because any bracket can occur in the text. Every segment has
a name in the first column, so a line without one continues the segment above.
"""

import io
import os
import pathlib
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from huatuo_jax.data.files import RowError
from huatuo_jax.data.formats.adapters import ADAPTERS
from huatuo_jax.data.formats.dialogues import Family
from huatuo_jax.data.inspection import FileReport, totals
from huatuo_jax.data.inspection_measures import TOKENS, Sample, Segment

_ERRORS_SHOWN = 10
_UNBOUNDED = 1_000_000  # columns: text for a file is not wrapped
_NOUNS: dict[Family, str] = {
    "dialogue": "dialogues",
    "prompt": "prompts",
    "comparison": "comparisons",
    "case": "cases",
    "exam": "exam questions",
}
_SEGMENT_CHARS = 1_000  # of a segment that is shown completely
_SEGMENT_ENDS = (700, 200)  # characters shown of the start and the end of a longer one

# A control character in a file must not steer the reader's terminal.
_CONTROLS = {
    code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if code != ord("\n")
}


def file_text(report: FileReport, *, width: int | None = None) -> str:
    """Returns the report of a file.

    Args:
        report: of the file.
        width: the columns of a terminal, which gets tables, colours and wrapped lines; None for
            plain text.
    """
    return _printed([_file_part(report, width)], width)


def totals_text(reports: Sequence[FileReport], *, width: int | None = None) -> str:
    """Returns an overview of several files, and the totals of each family."""
    parts = [_overview(reports, width)]
    for together in totals(reports):
        parts += [Text(""), _file_part(together, width)]
    return _printed(parts, width)


def _printed(parts: Sequence[RenderableType], width: int | None) -> str:
    out = io.StringIO()
    console = Console(
        file=out,
        force_terminal=width is not None,
        color_system="standard" if width is not None else None,
        no_color=True if width is None else None,  # None: as the environment's NO_COLOR says.
        width=width or _UNBOUNDED,
        highlight=False,
        markup=False,
        emoji=False,
        legacy_windows=False,
    )
    console.print(Group(*parts))
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().split("\n")) + "\n"


def _file_part(report: FileReport, width: int | None) -> RenderableType:
    parts: list[RenderableType] = [_shown(report.name, "bold")]
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="cyan", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in _facts(report):
        facts.add_row(f"  {name}", value)
    parts.append(facts)
    if report.tally.sizes:
        parts += [Text(""), _sizes_table(report, width)]
    for sample in report.samples:
        parts += [Text(""), _sample_part(sample)]
    return Group(*parts)


def _facts(report: FileReport) -> Iterable[tuple[str, Text]]:
    """Yields the facts about a file as (name, value) in the order of reading."""
    if report.layout is not None:
        yield "file", Text(report.layout)
    if report.family is not None:
        yield "holds", _shown(f"{_NOUNS[report.family]}, as {_formats(report)}")
        yield "kind", Text(_kinds(report))
    if report.rows:
        yield "rows", Text(_rows(report))
        yield "records", Text(f"{report.records:,}")
    for name, counter in (("left out", report.exclusions), ("mended", report.repairs)):
        for reason, count in counter.most_common():
            yield name, Text(f"{count:,}  {reason}")
    if report.rows:
        yield "errors", _errors(report, report.errors, of=f"of {report.rows:,} rows")
    if report.failure is not None:
        yield "cannot be read", _shown(report.failure, "red")
    for adapter in report.fitting_adapters:
        yield (
            "adapter",
            Text(f"--adapter={adapter.name} fits these rows: {adapter.about}", "yellow"),
        )
    if report.known_formats and not report.fitting_adapters:
        yield "formats", _list((one.name, one.keys) for one in report.known_formats)
        yield "adapters", _list((one.name, one.about) for one in ADAPTERS)
    if report.tally.refused:
        yield "not rendered", _errors(report, report.tally.refused, of="records, left out below")
    yield from _token_facts(report)


def _token_facts(report: FileReport) -> Iterable[tuple[str, Text]]:
    tally = report.tally
    share, packing = tally.trained_share, report.packing()
    if share is not None:
        yield "trained", Text(f"{share:.1%} of {sum(tally.sizes[TOKENS]):,} tokens")
    if tally.sizes and report.family != "case":
        yield f"over {tally.max_tokens:,}", Text(_over(report))
    if packing is not None:
        full, apart = f"{packing.efficiency:.1%}", f"{packing.unpacked_efficiency:.1%}"
        rows = f"{packing.num_rows:,} rows of {tally.max_tokens:,} tokens"
        yield "packing", Text(f"{rows}, {full} full (a row for each dialogue: {apart})")
    num = report.records - len(tally.refused)
    if report.family == "comparison" and num:
        share = tally.chosen_longer / num
        yield "length", Text(f"the chosen answer is the longer one in {share:.1%} of the pairs")
    if report.family == "exam":
        yield (
            "several",
            Text(f"{tally.several_answers:,} questions have more than one right option"),
        )


def _formats(report: FileReport) -> str:
    """Returns the names of the formats, with the rows of each if there are several."""
    if len(report.formats) == 1:
        return f'"{next(iter(report.formats))}"'
    return ", ".join(f'"{name}" {count:,}' for name, count in report.formats.most_common())


def _kinds(report: FileReport) -> str:
    if report.family != "dialogue":
        return "none (only dialogues have one)"
    kinds = [f"{kind or 'not stated'} {count:,}" for kind, count in report.kinds.most_common()]
    hint = " (--kind=... states it)" if None in report.kinds else ""
    return f"{', '.join(kinds)}{hint}"


def _rows(report: FileReport) -> str:
    left_out = report.exclusions.total()
    used = report.rows - len(report.errors) - left_out
    return f"{report.rows:,}: {used:,} used, {len(report.errors):,} bad, {left_out:,} left out"


def _errors(report: FileReport, errors: Sequence[RowError], *, of: str) -> Text:
    """Returns the number of errors and the first ones by line, and by file if several."""
    if not errors:
        return Text("none", "green")
    lines = [f"{len(errors):,} {of}"]
    for error in errors[:_ERRORS_SHOWN]:
        alone = error.file == report.name
        lines.append(f"line {error.line}: {error.reason}" if alone else str(error))
    more = len(errors) - _ERRORS_SHOWN
    lines += [f"and {more:,} more (--json=FILE writes them all)"] if more > 0 else []
    return Text("\n").join(_shown(line, "red") for line in lines)


def _list(items: Iterable[tuple[str, str]]) -> Text:
    """Returns one line for each name and its value."""
    return Text("\n").join(Text.assemble((name, "bold"), f": {about}") for name, about in items)


def _over(report: FileReport) -> str:
    tally = report.tally
    if report.family == "dialogue":
        if not tally.over:
            return "none"
        return (
            f"{tally.over:,} dialogues ({tally.over / len(tally.sizes[TOKENS]):.1%}): truncation"
            f" drops the oldest turns of {tally.shortened:,} ({tally.messages_dropped:,} turns),"
            f" and {tally.dropped:,} whole"
        )
    either = ", with either answer" if report.family == "comparison" else ""
    return f"{tally.over:,} of {report.records:,}{either}" if tally.over else "none"


def _sizes_table(report: FileReport, width: int | None) -> Table:
    table = _table(width)
    table.add_column("  per record" if width is None else "per record", no_wrap=True)
    for heading in ("min", "mean", "p50", "p90", "p99", "max"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, spread in report.distributions().items():
        numbers = [spread.minimum, spread.p50, spread.p90, spread.p99, spread.maximum]
        smallest, *others = (f"{number:,}" for number in numbers)
        shown = name if width else f"  {name}"
        table.add_row(shown, smallest, f"{spread.mean:,.1f}", *others)
    return table


def _overview(reports: Sequence[FileReport], width: int | None) -> RenderableType:
    """Returns one line a file, and their sums."""
    table = _table(width)
    table.add_column("file", overflow="fold")
    table.add_column("holds", no_wrap=True)
    for heading in ("rows", "records", "errors", "tokens", "trained"):
        table.add_column(heading, justify="right", no_wrap=True)
    for report, name in zip(reports, _short_names(reports), strict=True):
        counts = [f"{report.rows:,}", f"{report.records:,}", f"{len(report.errors):,}"]
        table.add_row(_shown(name), _holds(report), *counts, *_tokens(report))
    rows = sum(report.rows for report in reports)
    records = sum(report.records for report in reports)
    errors = sum(len(report.errors) for report in reports)
    table.add_section()
    table.add_row("total", "", f"{rows:,}", f"{records:,}", f"{errors:,}", "", "", style="bold")
    return Group(Text(f"all {len(reports)} files", "bold"), table)


def _holds(report: FileReport) -> Text:
    if report.failure is not None:
        return Text("cannot be read", "red")
    return Text(_NOUNS[report.family]) if report.family else Text("no records", "red")


def _tokens(report: FileReport) -> tuple[str, str]:
    sizes, share = report.tally.sizes, report.tally.trained_share
    tokens = f"{sum(sizes[TOKENS]):,}" if TOKENS in sizes else ""
    return tokens, "" if share is None else f"{share:.1%}"


def _short_names(reports: Sequence[FileReport]) -> list[str]:
    """Returns the names without the folder that they have in common."""
    names = [report.name for report in reports]
    try:
        shared = os.path.commonpath([str(pathlib.Path(name).parent) for name in names])
    except ValueError:  # Absolute and relative names have no folder in common.
        return names
    return [os.path.relpath(name, shared or ".") for name in names]


def _sample_part(sample: Sample) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for segment in sample.segments:
        marks = ("trained" if segment.marked else "", "special" if segment.special else "")
        style = _style(segment)
        mark = Text.assemble((" ".join(mark for mark in marks if mark), style))
        table.add_row(f"  {segment.label}", mark, _segment_text(segment, style))
    title = f"sample, {sample.title}"
    return Group(_shown(title, "bold"), table)


def _style(segment: Segment) -> str:
    colour = "green" if segment.marked else ""
    return " ".join(part for part in (colour, "reverse" if segment.special else "") if part)


def _segment_text(segment: Segment, style: str) -> Text:
    """Returns the text with visible edges: blanks at the ends as `␣`, line breaks as `↵`."""
    text = segment.text
    first, last = _SEGMENT_ENDS
    if len(text) > _SEGMENT_CHARS:
        between = f" [... {len(text) - first - last:,} characters not shown ...] "
        parts = [_edges(text[:first]), between, _edges(text[-last:])]
        return Text.assemble((parts[0], style), (parts[1], "yellow"), (parts[2], style))
    return Text.assemble((_edges(text), style))


def _edges(text: str) -> str:
    blanks_before = len(text) - len(text.lstrip(" "))
    blanks_behind = len(text) - len(text.rstrip(" ")) if blanks_before < len(text) else 0
    inner = text[blanks_before : len(text) - blanks_behind]
    visible = f"{'␣' * blanks_before}{inner}{'␣' * blanks_behind}"
    return visible.replace("\n", "↵\n").removesuffix("\n").translate(_CONTROLS)


def _table(width: int | None) -> Table:
    """Returns a table: with rules for a terminal, with blanks only elsewhere."""
    if width is None:
        return Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    return Table(box=box.SIMPLE_HEAD, pad_edge=True)


def _shown(text: str, style: str = "") -> Text:
    """Escapes text that comes from a file or holds its name."""
    return Text(text.translate(_CONTROLS), style)
