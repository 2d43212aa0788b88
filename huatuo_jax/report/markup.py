"""Pieces of a page: text made safe, numbers that can be read back, tables, figures.

All that a report tells, read from a run's folder; what a run does not have is None.
"""

import dataclasses
import html
import json
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from huatuo_jax.core.files import read_rows
from huatuo_jax.training.run_directory import CONFIG_FILE, DATA_FILE, ENVIRONMENT_FILE

ABSENT = "–"


def text(value: object) -> str:
    """Any text as HTML."""
    return html.escape(str(value))


def number(value: float | int | None, *, name: str | None = None, digits: int = 3) -> str:
    """A number as it is shown, with all of its digits in an attribute.

    Args:
        value: None or NaN shows as a dash.
        name: what programs find it by.
        digits: shown after the point.
    """
    if value is None or not math.isfinite(value):
        return ABSENT
    is_whole = isinstance(value, int) or (value.is_integer() and abs(value) >= 1000)
    shown = f"{value:,.0f}" if is_whole else f"{value:,.{digits}f}"
    shown = shown.replace("-", "\u2212")  # A minus that is as wide as a digit.
    found = "" if name is None else f' data-name="{text(name)}"'
    return f'<data value="{value!r}"{found}>{shown}</data>'


def interval(found: Mapping[str, Any] | None, *, name: str | None = None, digits: int = 3) -> str:
    """A figure with its 95 % interval."""
    if found is None:
        return ABSENT
    return f"{number(found['value'], name=name, digits=digits)} {bounds(found, digits=digits)}"


def bounds(found: Mapping[str, Any], *, digits: int = 3) -> str:
    """The 95 % interval of a figure."""
    low, high = number(found["low"], digits=digits), number(found["high"], digits=digits)
    return f'<span class="ci">[{low}, {high}]</span>'


def percent(value: float | None) -> str:
    """A share."""
    return ABSENT if value is None else f"{number(100 * value, digits=1)} %"


def seconds(value: float) -> str:
    """A duration."""
    if value < 60:
        return f"{number(value, digits=1)} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    caption: str = "",
    words: bool = False,
) -> str:
    """A table whose cells are HTML already; it scrolls by itself where the page is narrow.

    Args:
        head: titles of the columns.
        rows: each row's cells, its name first.
        caption: above the table.
        words: the cells are text, which is set from the left.
    """
    titles = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(
        f"<tr><th scope=row>{row[0]}</th>"
        + "".join(f"<td>{cell}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    kind = ' class="words"' if words else ""
    told = f"<caption>{caption}</caption>" if caption else ""
    return (
        f'<div class="scroll"><table{kind}>{told}<thead><tr>{titles}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def section(name: str, title: str, *parts: str) -> str:
    """A part of the page that the contents link to."""
    return f'<section id="{name}"><h2>{text(title)}</h2>{"".join(parts)}</section>'


def paragraph(*sentences: str) -> str:
    """Sentences that are HTML already."""
    return f"<p>{' '.join(sentences)}</p>"


def turns(messages: Iterable[tuple[str, str]]) -> str:
    """The turns of a prompt, each a role and a text; the system's is left out."""
    return "".join(
        f'<p class="turn"><b>{_SPEAKERS[role]}</b>{text(said)}</p>'
        for role, said in messages
        if role != "system"
    )


_SPEAKERS = {"user": "Patient", "assistant": "Doctor"}


def figures(*drawn: tuple[str, str]) -> str:
    """Plots side by side where there is room, each with its caption."""
    shown = "".join(
        f"<figure>{svg}<figcaption>{caption}</figcaption></figure>" for svg, caption in drawn
    )
    return f'<div class="figures">{shown}</div>'


def card(title: str, value: str, note: str) -> str:
    """A headline number."""
    return f'<div class="card"><h3>{title}</h3><p class="big">{value}</p><p>{note}</p></div>'


def details(summary: str, *parts: str) -> str:
    """What is folded away."""
    return f"<details><summary>{text(summary)}</summary>{''.join(parts)}</details>"


Rows = list[dict[str, Any]]
MODELS = ("base", "sft", "best_of_n", "ppo", "reference")


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's files.

    Attributes:
        folder: the run's.
        journal: `recipe.json`: settings, times and result of each stage.
        config: `config.json`: all settings of the training stages.
        environment: the newest start in `environment.json`.
        dialogues: statistics of the dialogues of fine-tuning.
        metrics: rows of each training stage.
        accounts: of prompts, answers and each training stage: what became of all that was read.
        labels: the judge's report.
        reward: the reward model's held-out report.
        samples: PPO's answers while it was trained.
        evaluation: `evaluation.json`.
        release: `export/release.json`.
        answers: scored answers of each model to the held-out prompts.
    """

    folder: pathlib.Path
    journal: dict[str, Any]
    config: dict[str, Any]
    environment: dict[str, Any] | None
    dialogues: dict[str, Any] | None
    metrics: dict[str, Rows]
    accounts: dict[str, dict[str, Any]]
    labels: dict[str, Any] | None
    reward: dict[str, Any] | None
    samples: Rows
    evaluation: dict[str, Any] | None
    release: dict[str, Any] | None
    answers: dict[str, Rows]

    def series(self, stage: str, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric, where it was written."""
        rows = [row for row in self.metrics[stage] if name in row]
        return [row["step"] for row in rows], [row[name] for row in rows]


def read_run(folder: pathlib.Path) -> Run:
    """Reads what there is.

    Raises:
        ValueError: a file is no JSON.
    """
    config = _json(folder / CONFIG_FILE) or {}
    environment = _json(folder / ENVIRONMENT_FILE)
    return Run(
        folder=folder,
        journal=_json(folder / "recipe.json") or {},
        config=config,
        environment=environment["starts"][-1] if environment else None,
        dialogues=_dialogues(folder, config),
        metrics={
            stage: _rows(folder / stage / "metrics.jsonl") for stage in ("sft", "reward", "ppo")
        },
        accounts=_accounts(folder),
        labels=_json(folder / "labels.jsonl.report.json"),
        reward=_json(folder / "reward" / "reward_report.json"),
        samples=_rows(folder / "ppo" / "samples.jsonl"),
        evaluation=_json(folder / "evaluation.json"),
        release=_json(folder / "export" / "release.json"),
        answers={name: _rows(folder / "evaluation" / f"scored_{name}.jsonl") for name in MODELS},
    )


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A file of the run.

    Raises:
        ValueError: it is no JSON.
        OSError: it cannot be read.
    """
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error})") from error
    return found


def _dialogues(folder: pathlib.Path, config: dict[str, Any]) -> dict[str, Any] | None:
    if "sft" not in config:
        return None
    cache = config["sft"]["settings"]["data"]["cache"] or folder / "data"
    name = config["sft"]["decisive"]["dialogues"]["cache"]
    return _json(pathlib.Path(cache) / name / "statistics.json")


def _accounts(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    places = {
        "prompts": folder / "prompts.jsonl.report.json",
        "answers": folder / "answers.jsonl.report.json",
        **{stage: folder / stage / DATA_FILE for stage in ("sft", "reward", "dpo", "ppo")},
        **{
            f"evaluation of {name}": folder / "evaluation" / f"answers_{name}.jsonl.report.json"
            for name in MODELS
        },
    }
    found = {name: _json(path) for name, path in places.items()}
    return {name: account for name, account in found.items() if account is not None}


def _json(path: pathlib.Path) -> dict[str, Any] | None:
    return read_json(path) if path.exists() else None


def _rows(path: pathlib.Path) -> Rows:
    return read_rows(path, unfinished="skip") if path.exists() else []
