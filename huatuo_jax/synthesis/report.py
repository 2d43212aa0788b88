"""The report of a run: yield, cost, rejections, distributions, length and diversity.

FILE.jsonl.report.json    the figures
FILE.jsonl.report.html    the same as a page
FILE.jsonl.card.md        the dataset's card
"""

import dataclasses
import json
import pathlib
import random
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import huggingface_hub
import numpy as np
from rapidfuzz import process
from rapidfuzz.distance import Indel

from huatuo_jax.core.files import as_path, write_file
from huatuo_jax.judge.spending import Price, Totals
from huatuo_jax.report.evaluation_blocks import Block, Cell, Note, Table, number
from huatuo_jax.report.evaluation_page import Section, render_sections
from huatuo_jax.synthesis.jobs import Candidate, Rejection, Task
from huatuo_jax.synthesis.near_duplicates import comparable
from huatuo_jax.synthesis.personal_data import mask
from huatuo_jax.synthesis.runner import Outcome

FORMAT = "huatuo-synthesis-1"
_SAMPLES = 3
_SAMPLE_CHARACTERS = 160
_NEIGHBOURS_OF, _AMONG = 200, 4_000
_ROWS_SHOWN = 40


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFacts:
    """Facts of a run beside its outcome, for its report.

    Attributes:
        kind: of the data.
        teacher: its name.
        settings: of the command; no key is among them.
        totals: spent by all runs; None where nothing is paid.
        price: of the teacher's tokens; None where it is not known.
        num_known_prompts: seeds that rows were compared with.
        num_tests: test texts that rows were compared with.
    """

    kind: str
    teacher: str
    settings: Mapping[str, Any]
    totals: Totals | None
    price: Price | None
    num_known_prompts: int
    num_tests: int


def write_report(outcome: Outcome, facts: RunFacts, output: pathlib.Path) -> dict[str, Any]:
    """Writes figures, page and card beside the rows, and returns the figures.

    Raises:
        OSError: a file cannot be written.
    """
    figures = report_figures(outcome, facts)
    text = json.dumps(figures, ensure_ascii=False, indent=1, allow_nan=False)
    write_file(as_path(f"{output}.report.json"), text.encode("utf-8", "replace"))
    page = render_page(figures)
    write_file(as_path(f"{output}.report.html"), page.encode("utf-8", "replace"))
    card = dataset_card(figures, output.name)
    write_file(as_path(f"{output}.card.md"), card.encode("utf-8", "replace"))
    return figures


def report_figures(outcome: Outcome, facts: RunFacts) -> dict[str, Any]:
    """Returns all figures as JSON."""
    num_rows, num_rejected = len(outcome.rows), len(outcome.rejected)
    candidates = num_rows + num_rejected
    return {
        "format": FORMAT,
        "kind": facts.kind,
        "teacher": facts.teacher,
        "settings": dict(facts.settings),
        "rows": num_rows,
        "candidates": candidates,
        "yield": num_rows / candidates if candidates else None,
        "batches": outcome.batches,
        "unfinished": outcome.unfinished,
        "stopped": outcome.stopped,
        "ended": outcome.ended,
        "seconds": round(outcome.seconds, 3),
        "requests": _by_attempt(outcome.requests),
        "cost": _cost(num_rows, facts),
        "rejections": rejections(outcome.rejected),
        "masked": dict(outcome.masked),
        "known_prompts": facts.num_known_prompts,
        "test_texts": facts.num_tests,
        "labels": {
            name: dict(counter.most_common())
            for name, counter in label_counts(outcome.kept).items()
        },
        "lengths": _lengths(outcome.kept),
        "diversity": diversity(outcome.kept),
    }


def _by_attempt(requests: Mapping[tuple[Task, int], int]) -> dict[str, dict[str, int]]:
    """Returns the number of requests by task and then by attempt, from the first on."""
    found: dict[str, dict[str, int]] = {}
    for (task, attempt), count in sorted(requests.items()):
        found.setdefault(task, {})[str(attempt)] = count
    return found


def _cost(num_rows: int, facts: RunFacts) -> dict[str, Any] | None:
    totals, price = facts.totals, facts.price
    if totals is None:
        return None
    money = None if price is None else totals.cost
    return {
        "requests": totals.requests,
        "unknown_requests": totals.unknown_requests,
        "input_tokens": totals.usage.input_tokens,
        "output_tokens": totals.usage.output_tokens,
        "cached_tokens": totals.usage.cached_tokens,
        "money": money,
        "unknown_money_at_most": None if price is None else totals.unknown_cost,
        "currency": None if price is None else price.currency,
        "price": None if price is None else price.to_json(),
        "money_per_row": money / num_rows if money is not None and num_rows else None,
        "requests_per_row": totals.requests / num_rows if num_rows else None,
        "tokens_per_row": (totals.usage.input_tokens + totals.usage.output_tokens) / num_rows
        if num_rows
        else None,
    }


def rejections(rejected: Mapping[str, Rejection]) -> dict[str, Any]:
    """Returns by reason the number of candidates, of the details, and samples, masked."""
    found: dict[str, list[tuple[str, Rejection]]] = {}
    for name, one in rejected.items():
        found.setdefault(one.reason, []).append((name, one))
    draw = random.Random(0)
    return {
        reason: {
            "count": len(ones),
            "samples": [
                {
                    "id": name,
                    "detail": mask(one.detail).text[:_SAMPLE_CHARACTERS],
                    "text": mask(one.sample).text[:_SAMPLE_CHARACTERS],
                }
                for name, one in draw.sample(ones, min(_SAMPLES, len(ones)))
            ],
        }
        for reason, ones in sorted(found.items(), key=lambda item: -len(item[1]))
    }


def label_counts(kept: Sequence[Candidate]) -> dict[str, Counter[str]]:
    """Returns the number of rows by label and value."""
    found: dict[str, Counter[str]] = {}
    for one in kept:
        for name, value in one.labels.items():
            found.setdefault(name, Counter())[value] += 1
    return found


def _lengths(kept: Sequence[Candidate]) -> dict[str, dict[str, float]]:
    """Returns characters of prompts and answers, and turns of a dialogue."""
    if not kept:
        return {}
    answers = [
        len(message.content)
        for one in kept
        for message in one.messages
        if message.role == "assistant"
    ]
    measured = {
        "characters of a prompt": [len(one.prompt) for one in kept],
        "characters of an assistant turn": answers,
        "messages of a row": [len(one.messages) for one in kept],
    }
    return {name: _spread(values) for name, values in measured.items() if values}


def _spread(values: Sequence[int]) -> dict[str, float]:
    cuts = np.percentile(np.asarray(values, np.float64), (5, 50, 95))
    low, middle, high = (float(one) for one in cuts)
    return {"mean": statistics.fmean(values), "p5": low, "median": middle, "p95": high}


def diversity(kept: Sequence[Candidate], *, seed: int = 0) -> dict[str, Any]:
    """Returns distinct-n over characters, and how near a prompt's nearest other one is.

    Distinct-n is the share of different n-grams of all prompts, or all assistant turns, together
    (Li et al. 2016, arXiv 1510.03055); it falls with the number of rows. Neighbours are looked for
    among a sample of rows.
    """
    if not kept:
        return {}
    texts = {
        "prompts": [comparable(one.prompt) for one in kept],
        "assistant turns": [
            comparable(message.content)
            for one in kept
            for message in one.messages
            if message.role == "assistant"
        ],
    }
    found: dict[str, Any] = {
        f"distinct-{order} of {name}": distinct(own, order)
        for name, own in texts.items()
        for order in (1, 2, 4)
    }
    draw = random.Random(seed)
    among = draw.sample(texts["prompts"], min(_AMONG, len(kept)))
    if len(among) > 1:
        similarity = process.cdist(
            among[:_NEIGHBOURS_OF], among, scorer=Indel.normalized_similarity, dtype=np.float32
        )
        rows = np.arange(len(similarity))
        similarity[rows, rows] = -1.0
        nearest = [float(one) for one in similarity.max(axis=1)]
        found["nearest neighbour, ROUGE-L"] = {
            "mean": statistics.fmean(nearest),
            "p95": float(np.percentile(nearest, 95)),
            "sampled": len(nearest),
            "among": len(among),
        }
    return found


def distinct(texts: Sequence[str], order: int) -> float | None:
    """Returns the share of different n-grams of characters; None where there are none."""
    grams: set[str] = set()
    total = 0
    for text in texts:
        own = [text[start : start + order] for start in range(len(text) - order + 1)]
        grams.update(own)
        total += len(own)
    return len(grams) / total if total else None


def render_page(figures: Mapping[str, Any]) -> str:
    """Returns the report as one HTML page."""
    sections = [
        Section(id="overview", title="Yield and cost", blocks=list(_overview(figures))),
        Section(id="rejections", title="Left out", blocks=_rejection_blocks(figures)),
        Section(id="distribution", title="Distribution", blocks=_label_blocks(figures)),
        Section(id="texts", title="Length and diversity", blocks=_text_blocks(figures)),
        Section(id="settings", title="Settings", blocks=_setting_blocks(figures)),
    ]
    return render_sections(
        sections,
        title=f"Synthesis: {figures['kind']}",
        told=f"{figures['rows']:,} rows · teacher: {figures['teacher']}",
    )


def _overview(figures: Mapping[str, Any]) -> list[Block]:
    rows = [
        ("rows kept", number(figures["rows"])),
        ("candidates", number(figures["candidates"])),
        ("yield", _percent(figures["yield"])),
        ("batches", number(figures["batches"])),
        ("seeds that prompts were compared with", number(figures["known_prompts"])),
        ("test texts that rows were compared with", number(figures["test_texts"])),
    ]
    cost = figures["cost"]
    if cost is not None:
        money = cost["currency"]
        rows += [
            ("requests sent", number(cost["requests"])),
            ("requests of unknown cost", number(cost["unknown_requests"])),
            ("tokens in", number(cost["input_tokens"])),
            ("tokens out", number(cost["output_tokens"])),
            ("requests a kept row", number(cost["requests_per_row"])),
            ("tokens a kept row", number(cost["tokens_per_row"], digits=1)),
        ]
        if money is not None:
            rows += [
                (f"cost in {money}", number(cost["money"], digits=6)),
                (f"cost of a kept row in {money}", number(cost["money_per_row"], digits=6)),
                (
                    f"at most beside it, of unknown cost, in {money}",
                    number(cost["unknown_money_at_most"], digits=6),
                ),
            ]
    blocks: list[Block] = [_table(("", "value"), rows)]
    asked = figures["requests"]
    if asked:
        attempts = range(1, max(len(counts) for counts in asked.values()) + 1)
        counted = [
            (str(one), *(number(counts.get(str(one), 0)) for counts in asked.values()))
            for one in attempts
        ]
        caption = "Requests with a reply: a faulty one was asked for again"
        blocks.append(_table(("attempt", *asked), counted, caption=caption))
    if cost is not None and cost["price"] is not None and cost["price"]["is_example"]:
        blocks.append(
            Note(
                text="The prices are those of the shipped example table, which nobody has checked.",
                warning=True,
            )
        )
    for name in ("stopped", "ended"):
        if figures[name]:
            blocks.append(Note(text=f"The run {name}: {figures[name]}", warning=True))
    if figures["masked"]:
        told = ", ".join(f"{kind} {count:,}" for kind, count in figures["masked"].items())
        blocks.append(Note(text=f"Personal data masked in kept rows: {told}."))
    return blocks


def _rejection_blocks(figures: Mapping[str, Any]) -> list[Block]:
    found = figures["rejections"]
    if not found:
        return [Note(text="No candidate was left out.")]
    total = figures["candidates"]
    rows = [
        (reason, number(one["count"]), f"{100 * one['count'] / total:.1f} %")
        for reason, one in found.items()
    ]
    blocks: list[Block] = [_table(("reason", "candidates", "of all"), rows)]
    for reason, one in found.items():
        shown = [(sample["id"], sample["detail"], sample["text"]) for sample in one["samples"]]
        blocks.append(
            _table(
                ("id", "found", "text"),
                shown,
                caption=f"Samples: {reason}",
                folded=True,
                kind="words",
            )
        )
    return blocks


def _label_blocks(figures: Mapping[str, Any]) -> list[Block]:
    blocks: list[Block] = []
    for name, counts in figures["labels"].items():
        rows = [
            (value, number(count), f"{100 * count / figures['rows']:.1f} %")
            for value, count in list(counts.items())[:_ROWS_SHOWN]
        ]
        more = len(counts) - _ROWS_SHOWN
        caption = "" if more <= 0 else f"The {_ROWS_SHOWN} largest of {len(counts)}"
        blocks.append(_table((name, "rows", "share"), rows, caption=caption))
    return blocks or [Note(text="The rows have no labels.")]


def _text_blocks(figures: Mapping[str, Any]) -> list[Block]:
    names = ("mean", "p5", "median", "p95")
    lengths = [
        (name, *(number(float(one[field]), digits=1) for field in names))
        for name, one in figures["lengths"].items()
    ]
    rows = []
    for name, value in figures["diversity"].items():
        if isinstance(value, dict):
            rows.append((f"{name}, mean of {value['sampled']}", number(value["mean"])))
            rows.append((f"{name}, 95th percentile", number(value["p95"])))
        else:
            rows.append((name, number(value)))
    return [_table(("", *names), lengths), _table(("", "value"), rows)]


def _setting_blocks(figures: Mapping[str, Any]) -> list[Block]:
    rows = [
        (name, json.dumps(value, ensure_ascii=False)) for name, value in figures["settings"].items()
    ]
    return [_table(("setting", "value"), rows, kind="words")]


def _table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    caption: str = "",
    folded: bool = False,
    kind: str = "table",
) -> Table:
    return Table(
        head=head,
        rows=[(row[0], [Cell(text=text) for text in row[1:]]) for row in rows],
        caption=caption,
        folded=folded,
        kind=kind,
    )


def dataset_card(figures: Mapping[str, Any], file_name: str) -> str:
    """Returns the card of a dataset of these rows, for its README on the Hub."""
    head = huggingface_hub.DatasetCardData(
        license="unknown",
        language=sorted(figures["labels"].get("language", {"zh": 0})),
        tags=["medical", "synthetic", figures["kind"]],
        task_categories=["text-generation"],
        configs=[{"config_name": "default", "data_files": file_name}],
    )
    settings = json.dumps(figures["settings"], ensure_ascii=False, indent=2)
    lines = ["---", head.to_yaml(line_break="\n"), "---", "", f"# {figures['kind']}", ""]
    lines += [
        f"{figures['rows']:,} rows of synthetic medical data, made by the teacher"
        f" `{figures['teacher']}` with huatuo_jax.",
        "",
        "The texts are a language model's. They were checked by rules, not by doctors, and are no",
        "medical advice. Text by a commercial model falls under its provider's terms of use, and",
        "polished real answers under the licence of their source: the licence above is for whoever",
        "publishes this to fill in.",
        "",
        "## How it was made",
        "",
        "| | |",
        "|---|---|",
        f"| candidates | {figures['candidates']:,} |",
        f"| kept | {figures['rows']:,} ({_percent(figures['yield'])}) |",
        f"| compared with test texts | {figures['test_texts']:,} |",
    ]
    masked = ", ".join(f"{kind} {count}" for kind, count in figures["masked"].items()) or "none"
    lines += [f"| personal data masked | {masked} |", ""]
    if figures["rejections"]:
        lines += ["Left out:", "", "| reason | candidates |", "|---|---|"]
        lines += [
            f"| {reason} | {one['count']:,} |" for reason, one in figures["rejections"].items()
        ]
        lines.append("")
    for name, counts in figures["labels"].items():
        lines += [f"## By {name}", "", "| | rows |", "|---|---|"]
        lines += [f"| {_cell(value)} | {count:,} |" for value, count in counts.items()]
        lines.append("")
    lines += ["## Settings", "", "```json", settings, "```", ""]
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "none" if share is None else f"{100 * share:.1f} %"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
