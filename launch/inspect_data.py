"""Look into data files: counts, token lengths, errors by line, and samples with trained tokens.

python launch/inspect_data.py FILES... [--adapter=NAME] [--template=NAME] [--tokenizer=DIR]
"""

from absl import flags

from huatuo_jax import command_line, progress
from huatuo_jax.checkpoint.tokenizer import load_tokenizer
from huatuo_jax.data import sample
from huatuo_jax.data.inspection import Inspector, check_json_target, complaint, write_json
from huatuo_jax.data.inspection_report import file_text, totals_text
from huatuo_jax.data.readers import ReadOptions
from huatuo_jax.data.records import KINDS
from huatuo_jax.data.templates import by_name

_READ = (
    flags.DEFINE_string("adapter", None, "Adapter for all files; an unknown name lists all."),
    flags.DEFINE_enum("kind", None, KINDS, "Kind of all dialogues; default: the rows' own."),
    flags.DEFINE_string("split", "train", "Part of parquet, Arrow or hub data to read."),
    flags.DEFINE_string("encoding", None, "Of text, such as cp1252; default: told by evidence."),
    flags.DEFINE_float("max_error_share", 0.01, "Share of bad rows that is allowed."),
)
_TEMPLATE = flags.DEFINE_string("template", "huatuogpt", "Chat template; a wrong name lists all.")
_DATE = flags.DEFINE_string("template_date", None, "Date that a tokenizer's own template prints.")
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "Folder or hub id; default: the sample data's.")
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 2048, "Length limit of a dialogue.")
_SAMPLES = flags.DEFINE_integer("samples", 1, "Records of each file to show.")
_JSON = flags.DEFINE_string("json", None, "File to write all of it to, every bad row included.")


def main(files: list[str]) -> None:
    """Report on the files; end in an error if one should not be trained on as it is."""
    if _JSON.value is not None:
        check_json_target(_JSON.value, files)
    read = ReadOptions(**{flag.name: flag.value for flag in _READ})
    inspector = Inspector(
        template=by_name(_TEMPLATE.value, date=_DATE.value),
        tokenizer=load_tokenizer(_TOKENIZER.value or sample.FOLDER / "tokenizer"),
        max_tokens=_MAX_TOKENS.value,
        num_samples=_SAMPLES.value,
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
    if _JSON.value is not None:
        write_json(reports, _JSON.value)
    if problem := complaint(reports, max_error_share=read.max_error_share):
        raise ValueError(problem)


if __name__ == "__main__":
    command_line.run(main, positional="FILES")
