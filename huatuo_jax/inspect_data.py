"""The command that inspects data files: counts, token lengths, errors, rendered samples."""

import dataclasses

from huatuo_jax.core import command_line, progress
from huatuo_jax.data import SAMPLE_FOLDER
from huatuo_jax.data.chat.templates import by_name
from huatuo_jax.data.inspection import Inspector, check_json_target, complaint, write_json
from huatuo_jax.data.inspection_report import file_text, totals_text
from huatuo_jax.data.readers import ReadOptions
from huatuo_jax.data.records import Kind
from huatuo_jax.hf.tokenizer import load_tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """Look into data files: counts, token lengths, errors by line, samples with trained tokens.

    Attributes:
        files: data files.
        adapter: adapter for all files; an unknown name lists all.
        kind: kind of all dialogues; None for the rows' own.
        split: part of parquet, Arrow or Hub data to read.
        encoding: of text, such as cp1252; None decides by evidence.
        max_error_share: share of bad rows that is allowed.
        template: chat template; a wrong name lists all.
        template_date: date that a tokenizer's own template prints.
        tokenizer: folder or Hub id; None for the sample data's.
        max_tokens: length limit of a dialogue.
        samples: records of each file to show.
        json: file to write all of it to, every bad row included.
    """

    files: command_line.Files
    adapter: str | None = None
    kind: Kind | None = None
    split: str = "train"
    encoding: str | None = None
    max_error_share: float = 0.01
    template: str = "huatuogpt"
    template_date: str | None = None
    tokenizer: str | None = None
    max_tokens: int = 2048
    samples: int = 1
    json: str | None = None


def main(flags: Flags) -> None:
    """Prints a report on the files; raises ValueError if one should not be trained on unchanged."""
    files = list(flags.files)
    if flags.json is not None:
        check_json_target(flags.json, files)
    read = ReadOptions(
        kind=flags.kind,
        adapter=flags.adapter,
        split=flags.split,
        encoding=flags.encoding,
        max_error_share=flags.max_error_share,
    )
    inspector = Inspector(
        template=by_name(flags.template, date=flags.template_date),
        tokenizer=load_tokenizer(flags.tokenizer or SAMPLE_FOLDER / "tokenizer"),
        max_tokens=flags.max_tokens,
        num_samples=flags.samples,
        read=read,
    )
    reports, width = [], command_line.terminal_width()
    for number, file in enumerate(files, start=1):
        label = f"inspecting file {number} of {len(files)}"
        with progress.progress_bar(label, "records") as on_progress:
            reports.append(inspector(file, on_progress=on_progress))
        if reports[-1].rows or len(files) > 1:  # Else all there is to say is the error below.
            print(file_text(reports[-1], width=width), flush=True)
    if len(files) > 1:
        print(totals_text(reports, width=width), flush=True)
    if flags.json is not None:
        write_json(reports, flags.json)
    if problem := complaint(reports, max_error_share=read.max_error_share):
        raise ValueError(problem)
