"""Writes a run's prompts, labels and comparisons as a dataset with its card."""

import dataclasses
import json
import pathlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import huggingface_hub

from huatuo_jax.core.files import Row, read_lines, write_rows
from huatuo_jax.data.records import Comparison, Messages, Prompt
from huatuo_jax.hub.account import REMOVED, without_credentials
from huatuo_jax.judge.judgements import CRITERIA, Judgement, current, read_judgements
from huatuo_jax.judge.questions import Answered, matching, read_answered
from huatuo_jax.judge.report import LabelReport, label_report

PROMPTS_FILE = "prompts.jsonl"
LABELS_FILE = "labels.jsonl"
COMPARISONS_FILE = "comparisons.jsonl"
DATA_FILES = (PROMPTS_FILE, LABELS_FILE, COMPARISONS_FILE)
_ANSWERS_FILE = "answers.jsonl"
_SOURCES_SHOWN = 20

_Feature = dict[str, Any]
_RecordT = TypeVar("_RecordT")
_MEANINGS = {
    PROMPTS_FILE: "what was asked; `reference` is a doctor's answer, `diagnosis` their finding",
    LABELS_FILE: (
        "one verdict of the judge a row, on the answers `texts` to the prompt `id`: with the "
        "protocol `score` five scores of one answer, with `pairwise` the probability `p_first` "
        "that the first of two is the better one"
    ),
    COMPARISONS_FILE: "pairs made of the verdicts: two answers to a prompt, the better one first",
}


def _text(name: str) -> _Feature:
    return {"name": name, "dtype": "string"}


def _number(name: str, dtype: str = "float64") -> _Feature:
    return {"name": name, "dtype": dtype}


def _messages(name: str) -> _Feature:
    return {"name": name, "list": [_text("role"), _text("content")]}


# The card declares the columns: the first rows of a file may be null alone, which tell no type.
_COLUMNS: Mapping[str, tuple[_Feature, ...]] = {
    PROMPTS_FILE: (
        _text("id"),
        _messages("messages"),
        _text("reference"),
        _text("diagnosis"),
        _text("source"),
    ),
    LABELS_FILE: (
        _text("id"),
        _text("protocol"),
        {"name": "answers", "list": "int64"},
        {"name": "texts", "list": "string"},
        {"name": "scores", "struct": [_number(criterion) for criterion in CRITERIA]},
        _number("p_first"),
        _text("reason"),
        _text("judge"),
        _text("template"),
    ),
    COMPARISONS_FILE: (
        _text("id"),
        _messages("messages"),
        _messages("chosen"),
        _messages("rejected"),
        _number("p_chosen"),
        _number("margin"),
        _text("source"),
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Written:
    """The outcome of `write_dataset`.

    Attributes:
        missing: files that the run does not have.
        notes: for the user.
    """

    missing: tuple[str, ...]
    notes: tuple[str, ...]


def write_dataset(
    run: pathlib.Path, target: pathlib.Path, *, license_id: str, settings: Mapping[str, Any]
) -> Written:
    """Writes the dataset's files and its card.

    Rows have the columns that the card names and no others: no server's replies or errors, no
    token ids. What looks like a key, or a password in an address, is replaced.

    Args:
        run: the run's folder.
        target: the folder to write into.
        license_id: the Hub's identifier of the licence.
        settings: of the judging, for the card.

    Raises:
        ValueError: the run has none of the files, or a row does not parse; file and line are named.
        OSError: a file cannot be read or written.
    """
    found: dict[str, list[Row]] = {}
    notes: list[str] = []
    report: LabelReport | None = None
    if (run / PROMPTS_FILE).is_file():
        found[PROMPTS_FILE] = _rows(run / PROMPTS_FILE, Prompt.from_json, _prompt_row)
    if (run / LABELS_FILE).is_file():
        found[LABELS_FILE], report, num_left_out = _label_rows(run)
        if num_left_out:
            notes.append(
                f"{num_left_out} judgements are left out of the labels, which failed or are of "
                "other answers"
            )
    if (run / COMPARISONS_FILE).is_file():
        found[COMPARISONS_FILE] = _rows(
            run / COMPARISONS_FILE, Comparison.from_json, _comparison_row
        )
    if not found:
        raise ValueError(f"{run}: no data to push; there is none of {', '.join(DATA_FILES)}")
    if empty := [name for name, rows in found.items() if not rows]:
        raise ValueError(f"{run / empty[0]}: holds no rows that could be pushed")
    clean = {name: [_clean(row) for row in rows] for name, rows in found.items()}
    num_changed = sum(
        one != other for name in found for one, other in zip(found[name], clean[name], strict=True)
    )
    if num_changed:
        notes.append(
            f"in {num_changed} rows {REMOVED} stands for what looked like a key or an address's "
            "password, and U+FFFD for halves of a broken character"
        )
    for name, rows in clean.items():
        write_rows(target / name, rows)
    sources = Counter(row["source"] for row in clean.get(PROMPTS_FILE, ()))
    card = dataset_card(
        {name: len(rows) for name, rows in clean.items()},
        sources,
        report,
        license_id=license_id,
        settings=settings,
        notes=notes,
    )
    (target / "README.md").write_text(card, encoding="utf-8")
    return Written(
        missing=tuple(name for name in DATA_FILES if name not in found), notes=tuple(notes)
    )


def dataset_card(
    counts: Mapping[str, int],
    sources: Mapping[str, int],
    report: LabelReport | None,
    *,
    license_id: str,
    settings: Mapping[str, Any],
    notes: Sequence[str] = (),
) -> str:
    """Returns the dataset's card.

    Args:
        counts: rows of each file.
        sources: prompts of each source.
        report: of the labels; None where there are none.
        license_id: the Hub's identifier of the licence.
        settings: of the judging.
        notes: on the rows.
    """
    names = {name: name.removesuffix(".jsonl") for name in counts}
    head = huggingface_hub.DatasetCardData(
        license=license_id,
        tags=["medical", "rlaif", "preference"],
        task_categories=["text-generation"],
        configs=[{"config_name": names[name], "data_files": name} for name in counts],
        dataset_info=[
            {"config_name": names[name], "features": list(_COLUMNS[name])} for name in counts
        ],
    )
    lines = [
        "---",
        head.to_yaml(line_break="\n"),
        "---",
        "",
        "# Prompts and AI feedback of a run",
        "",
    ]
    lines += [
        "The prompts may hold patients' words, and texts may hold what tells who a patient is: ask",
        "whoever gave the data before this is passed on or made public.",
        "",
        "The answers are a model's, the verdicts are those of the judge below. Neither is medical",
        "advice.",
        "",
        "| config | rows | what it is |",
        "|---|---|---|",
    ]
    lines += [
        f"| `{names[name]}` | {count} | {_MEANINGS[name]} |" for name, count in counts.items()
    ]
    lines += [
        "",
        "    import datasets",
        f'    datasets.load_dataset(REPOSITORY, "{names[list(counts)[-1]]}", split="train")',
        "",
    ]
    if sources:
        shown = sorted(sources.items(), key=lambda item: (-item[1], item[0]))
        lines += ["## Prompts by source", "", "| source | prompts |", "|---|---|"]
        lines += [f"| {_cell(name)} | {count} |" for name, count in shown[:_SOURCES_SHOWN]]
        if rest := [count for _, count in shown[_SOURCES_SHOWN:]]:
            lines.append(f"| {len(rest)} others | {sum(rest)} |")
        lines.append("")
    if report is not None:
        lines += _judge_lines(report, settings)
    if notes:
        lines += ["## What was changed", "", *(f"- {note}" for note in notes), ""]
    lines += ["## Licence", "", _licence_line(license_id), ""]
    return without_credentials("\n".join(lines))


def _judge_lines(report: LabelReport, settings: Mapping[str, Any]) -> list[str]:
    lines = [
        "## Who judged",
        "",
        "| judge | protocol | judgements | prompts | failed | ties | longer answer wins | cost |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for part in report.parts:
        unknown = f" and {part.cost.unknown} lines of unknown cost" if part.cost.unknown else ""
        lines.append(
            f"| {_cell(part.judge)} | {part.protocol} | {part.judgements} | {part.prompts} | "
            f"{part.failure_rate} | {part.ties} | {part.longer_wins} | "
            f"{part.cost.money:.6g}{unknown} |"
        )
    lines += ["", "Behind ± stands one standard error. Cost is in the currency of the price table."]
    lines += [f"{part.judge}: {part.note}" for part in report.parts if part.note]
    told = {name: value for name, value in settings.items() if value is not None}
    if told:
        text = json.dumps(told, ensure_ascii=False, indent=2)
        lines += ["", "Settings of the judge and of the pairs:", "", "```json", text, "```"]
    return [*lines, ""]


def _licence_line(license_id: str) -> str:
    if license_id in ("unknown", "other"):
        return (
            "Not stated. What licence holds for the prompts is for their source to say; until then "
            "the data is for no use beyond what that source allows."
        )
    return f"`{license_id}`, as stated by whoever pushed this dataset."


def _rows(
    path: pathlib.Path, parse: Callable[[Row], _RecordT], to_row: Callable[[_RecordT], Row]
) -> list[Row]:
    """Reads a file of the project's records into rows with the columns of the dataset."""
    rows = []
    for line in read_lines(path, unfinished="read"):
        try:
            row = to_row(parse(line.row))
            _check_texts(row, _COLUMNS[path.name])
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}:{line.number}: cannot be pushed: {error}") from error
        rows.append(row)
    return rows


def _check_texts(row: Row, columns: Sequence[_Feature]) -> None:
    for column in columns:
        value = row[column["name"]]
        if column.get("dtype") == "string" and not isinstance(value, str | None):
            raise ValueError(f"{column['name']} is a {type(value).__name__}; it should be text")


def _label_rows(run: pathlib.Path) -> tuple[list[Row], LabelReport, int]:
    """Returns the current verdicts with the texts judged, a report, and how many are left out."""
    answers = run / _ANSWERS_FILE
    if not answers.is_file():
        raise ValueError(f"{answers}: no such file; it holds the answers that the labels judge")
    answered, judgements = read_answered(answers), list(read_judgements(run / LABELS_FILE))
    by_id = {one.prompt.id: one for one in answered}
    fitting, others = matching(current(judgements), by_id)
    verdicts = [one for one in fitting if not one.failed]
    rows = [_label_row(one, by_id[one.id]) for one in verdicts]
    return rows, label_report(judgements, answered), len(fitting) - len(verdicts) + len(others)


def _prompt_row(prompt: Prompt) -> Row:
    return {
        "id": prompt.id,
        "messages": _plain(prompt.messages),
        "reference": prompt.reference,
        "diagnosis": prompt.diagnosis,
        "source": prompt.source,
    }


def _label_row(judgement: Judgement, answered: Answered) -> Row:
    scores = judgement.scores
    return {
        "id": judgement.id,
        "protocol": judgement.protocol,
        "answers": list(judgement.answers),
        "texts": [answered.answers[index] for index in judgement.answers],
        "scores": None if scores is None else {name: float(scores[name]) for name in CRITERIA},
        "p_first": None if judgement.p_first is None else float(judgement.p_first),
        "reason": judgement.reason,
        "judge": judgement.judge,
        "template": judgement.template,
    }


def _comparison_row(pair: Comparison) -> Row:
    return {
        "id": pair.id,
        "messages": _plain(pair.messages),
        "chosen": _plain(pair.chosen),
        "rejected": _plain(pair.rejected),
        "p_chosen": pair.p_chosen,
        "margin": None if pair.margin is None else float(pair.margin),
        "source": pair.source,
    }


def _plain(messages: Messages) -> list[dict[str, str]]:
    return [{"role": one.role, "content": one.content} for one in messages]


def _clean(value: Any) -> Any:
    """Removes credentials and lone surrogates from every text of a value."""
    if isinstance(value, str):
        whole = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return without_credentials(whole)
    if isinstance(value, list):
        return [_clean(item) for item in value]
    if isinstance(value, dict):
        return {name: _clean(item) for name, item in value.items()}
    return value


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
