"""Writes the page of an evaluation: tables with intervals, and radar plots of comparisons.

One HTML file that loads nothing from anywhere. Every text goes through Jinja's escaping.
"""

import pathlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2

from huatuo_jax.core.files import write_file
from huatuo_jax.evaluation.lexical import DISTINCT, METRICS
from huatuo_jax.report.evaluation_blocks import (
    ABSENT,
    RADIUS,
    Block,
    Cell,
    Note,
    Table,
    figure,
    number,
    percent,
    plain,
    radar,
)
from huatuo_jax.report.main_figures import main_figures

_TEMPLATE = "evaluation_page.jinja"
_FEWEST_GROUPS = 3
_EXAMPLES = 3

_TITLES = {
    "lexical": "Lexical metrics",
    "exams": "Exams",
    "single_turn": "Single-turn questions, compared",
    "multi_turn": "Consultations",
    "clinical": "CMB-Clin",
    "healthbench": "HealthBench",
    "clinic": "The clinic's truth",
}
_CLINIC = {
    "diagnosis_right": "diagnosis right",
    "diagnosis_plausible": "diagnosis plausible",
    "diagnosis_wrong": "diagnosis wrong",
    "diagnosis_absent": "no diagnosis",
    "diagnosis_right_where_clear": "right, where enough was told",
    "asks_when_needed": "asks, where too little was told",
    "contraindicated": "orders what is contraindicated",
    "red_flag_missed": "misses an emergency",
    "informative": "informative (1 to 5)",
    "overall": "overall (1 to 5)",
}


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page."""

    id: str
    title: str
    blocks: list[Block] = field(default_factory=list)


def write_page(result: Mapping[str, Any], path: pathlib.Path) -> None:
    """Writes the page of an evaluation's results, as `evaluation.json` has them.

    Raises:
        OSError: it cannot be written.
    """
    write_file(path, render_page(result).encode("utf-8", "replace"))


def render_page(result: Mapping[str, Any]) -> str:
    """The page as one HTML text."""
    writers = {
        "lexical": _lexical,
        "exams": _exams,
        "single_turn": _single_turn,
        "multi_turn": _multi_turn,
        "clinical": _clinical,
        "healthbench": _healthbench,
        "clinic": _clinic,
    }
    models = list(result["models"])
    sections = [Section(id="overview", title="Overview", blocks=[_overview(result, models)])]
    sections += [
        Section(id=name, title=_TITLES[name], blocks=list(writers[name](found, models)))
        for name, found in result["suites"].items()
    ]
    if result["contamination"] is not None:
        blocks = list(_contamination(result["contamination"]))
        sections.append(Section(id="contamination", title="Training data", blocks=blocks))
    sections.append(Section(id="settings", title="Settings", blocks=list(_settings(result))))
    return render_sections(
        sections,
        title="Evaluation",
        told=f"{', '.join(models)} · judge: {_judge_name(result['judge'])}",
    )


def render_sections(sections: Sequence[Section], *, title: str, told: str) -> str:
    """A page of tables, plots and notes as one HTML text; every value is escaped.

    Args:
        sections: in their order.
        title: of the page.
        told: the line below it.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(_TEMPLATE).render(
        title=title, told=told, sections=sections, radius=RADIUS
    )


def _overview(result: Mapping[str, Any], models: Sequence[str]) -> Table:
    """The main figures of each suite, a column for each model."""
    rows = [
        (one.title, [figure(one.shown(model), digits=one.digits) for model in models])
        for one in main_figures(result)
    ]
    return Table(head=["", *models], rows=rows)


def _judge_name(judge: Mapping[str, Any] | None) -> str:
    return "none" if judge is None else str(judge["judge"])


def _responses(model: str, found: Mapping[str, Any], more: str = "") -> Note:
    """The number of a model's responses, and of those that are none."""
    told = f"{model}: {found['num']} responses{more}"
    if found["num_missing"]:
        reasons = Counter(found["missing"].values())
        words = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        told += f", {found['num_missing']} missing ({words}) and taken as empty"
    if found["num_empty"]:
        told += f", {found['num_empty']} empty"
    if found["num_cut_at_limit"]:
        told += f", {found['num_cut_at_limit']} cut at the limit of tokens"
    return Note(text=f"{told}.", warning=bool(found["num_missing"] or found["num_empty"]))


def _lexical(found: Mapping[str, Any], models: Sequence[str]) -> Iterator[Block]:
    yield Note(text=f"Convention: {found['convention']}. Intervals: 95 %, over resampled pairs.")
    for name, one in found["sets"].items():
        by_model = one["models"]
        yield Table(
            caption=f"{name}: {one['num']} questions",
            head=["", *by_model],
            rows=[
                (
                    metric,
                    [
                        figure(each["figures"][metric], digits=3 if metric in DISTINCT else 2)
                        for each in by_model.values()
                    ],
                )
                for metric in METRICS
            ],
        )
        for model, each in by_model.items():
            yield _responses(model, each["responses"])
            if "conventions" in each:
                yield Table(
                    caption=f"{name}, {model}: the same responses under other conventions",
                    folded=True,
                    head=["", *METRICS],
                    rows=[
                        (
                            row["convention"],
                            [plain(row["values"][metric], digits=2) for metric in METRICS],
                        )
                        for row in each["conventions"]
                    ],
                )


def _exams(found: Mapping[str, Any], models: Sequence[str]) -> Iterator[Block]:
    settings = found["settings"]
    yield Note(
        text=f"Accuracy in percent with 95 % intervals; form {settings['form']},"
        f" {settings['num_examples']} examples. A reply from which no answer could be read is"
        " wrong. Macro is the unweighted mean over the classes of a set."
    )
    columns = [
        (model, by)
        for model in models
        for by in settings["by"]
        if any(by in one["models"].get(model, {}) for one in found["sets"].values())
    ]
    head = ["", *(f"{model}, {by}" for model, by in columns)]
    for title, pick in (
        ("Accuracy", lambda one: percent(one["accuracy"])),
        ("Macro accuracy", lambda one: percent(one["macro"])),
        ("Not read, or too long for the model", lambda one: percent(one["unparsed"])),
        ("Of them too long (questions)", lambda one: plain(one["num_too_long"])),
    ):
        yield Table(
            caption=title,
            head=head,
            rows=[
                (
                    f"{name} ({one['num']})",
                    [pick(one["models"][model][by]) for model, by in columns],
                )
                for name, one in found["sets"].items()
            ],
        )
    for name, one in found["sets"].items():
        if one["excluded"]:
            told = ", ".join(f"{count} {reason}" for reason, count in one["excluded"].items())
            yield Note(text=f"{name}: of {one['num_rows']} rows left out: {told}.", warning=True)


def _comparisons(
    found: Mapping[str, Any], models: Sequence[str], *, groups: str
) -> Iterator[Block]:
    """Wins, ties and losses of every two models, and the shares of points by group."""
    compared = found["comparisons"]
    if not compared:
        return
    rows = []
    for one in compared:
        figures = one["figures"]
        overall = figures["overall"]
        rows.append(
            (
                f"{one['models'][0]} against {one['models'][1]}",
                [
                    *(plain(overall[name]) for name in ("wins", "ties", "losses", "failed")),
                    percent(overall["share"]),
                    plain(overall["score_ratio"], digits=2),
                    plain(figures["orders_disagree"]),
                    percent(figures["position_bias"]),
                    percent(figures["longer_share"]),
                    percent(figures["length_bias"]),
                    percent(figures["length_balanced_share"]),
                ],
            )
        )
    yield Table(
        caption="The first model's wins, ties and losses in both orders; contests without a verdict"
        " failed. Shares and biases in percent, with 95 % intervals over contests. For balance,"
        " contests where the first model's response is the longer one weigh as much as those where"
        " it is the shorter one.",
        head=[
            *("", "wins", "ties", "losses", "failed", "share of wins", "score ratio"),
            *("orders disagree", "bias to the first shown", "points of the longer"),
            *("bias to the longer", "share of wins, lengths balanced"),
        ],
        rows=rows,
    )
    for one in compared:
        if one["second_judge"] is not None:
            agreement = one["second_judge"]["agreement"]
            overall = one["second_judge"]["figures"]["overall"]
            yield Note(
                text=f"{one['models'][0]} against {one['models'][1]}, second judge"
                f" {one['second_judge']['figures']['judge']}: {overall['wins']} wins,"
                f" {overall['ties']} ties, {overall['losses']} losses; Cohen's kappa with the judge"
                f" {number(agreement['kappa'])}, agreement {number(agreement['agreement'])} over"
                f" {agreement['num_contests']} contests."
            )
    names = list(compared[0]["figures"]["groups"])
    shares = {model: _group_shares(compared, model, names) for model in models}
    if len(names) >= _FEWEST_GROUPS:
        yield radar(shares, names, caption=f"Share of points by {groups}, in percent")
    for one in compared:
        yield Table(
            caption=f"By {groups}: {one['models'][0]} against {one['models'][1]}",
            head=["", "wins", "ties", "losses", "failed", "score ratio"],
            rows=[
                (
                    name,
                    [
                        *(plain(group[each]) for each in ("wins", "ties", "losses", "failed")),
                        plain(group["score_ratio"], digits=2),
                    ],
                )
                for name, group in one["figures"]["groups"].items()
            ],
        )


def _group_shares(
    compared: Sequence[Mapping[str, Any]], model: str, names: Sequence[str]
) -> list[float | None]:
    """A model's share of all points of its comparisons, by group; None without a verdict."""
    shares: list[float | None] = []
    for name in names:
        own = total = 0.0
        for one in compared:
            if model in one["models"] and name in one["figures"]["groups"]:
                group = one["figures"]["groups"][name]
                both = (group["points"], group["other_points"])
                own += both[one["models"].index(model)]
                total += sum(both)
        shares.append(own / total if total else None)
    return shares


def _single_turn(found: Mapping[str, Any], models: Sequence[str]) -> Iterator[Block]:
    yield Note(text=f"{found['num']} questions of patients.")
    yield from _comparisons(found, models, groups="intent")
    for model, one in found["models"].items():
        characters = number(one["mean_characters"], digits=0)
        yield _responses(model, one["responses"], f" of {characters} characters in the mean")
    if "human" in found:
        yield from _human(found["human"])


def _human(found: Mapping[str, Any]) -> Iterator[Block]:
    yield Note(text=f"Blind page for doctors: {found['page']}, {found['num_items']} pairs.")
    if "ratings" not in found:
        return
    ratings = found["ratings"]
    for one in ratings["comparisons"]:
        yield Table(
            caption=f"{len(ratings['raters'])} raters: {one['systems'][0]} against"
            f" {one['systems'][1]}, shares in percent",
            head=["", "wins", "ties", "losses", "win share", "loss share"],
            rows=[
                (
                    name,
                    [
                        *(plain(each[key]) for key in ("wins", "ties", "losses")),
                        percent(each["win_share"]),
                        percent(each["loss_share"]),
                    ],
                )
                for name, each in one["criteria"].items()
            ],
        )
    yield Table(
        caption="Agreement of the raters",
        head=["", "Fleiss' kappa", "items"],
        rows=[
            (name, [plain(one["fleiss"]["kappa"]), plain(one["fleiss"]["num_items"])])
            for name, one in ratings["agreement"].items()
        ],
    )
    if ratings["judge"] is not None:
        majority = ratings["judge"]["majority"]
        yield Note(
            text=f"Cohen's kappa of the judge with the raters' majority:"
            f" {number(majority['kappa'])}, over {majority['num_items']} items."
        )


def _multi_turn(found: Mapping[str, Any], models: Sequence[str]) -> Iterator[Block]:
    settings = found["settings"]
    ends = {
        "goodbye": f"the patient's goodbye, at the latest after {settings['max_exchanges']}"
        " exchanges",
        "exchanges": f"{settings['max_exchanges']} exchanges",
    }
    who = {"judge": "the judge's model", "clinic": "the clinic's patient"}
    yield Note(
        text=f"{found['num']} cases; the patient is {who[found['patient']]}; a consultation ends"
        f" with {ends[settings['ending']]}."
    )
    outcomes = {model: one["outcomes"] for model, one in found["models"].items()}
    kinds = dict.fromkeys(kind for one in outcomes.values() for kind in one["faults"])
    reasons = dict.fromkeys(reason for one in outcomes.values() for reason in one["ends"])
    rows: list[tuple[str, Sequence[Cell]]] = [
        ("consultations", [plain(one["consultations"]) for one in outcomes.values()]),
        (
            "diagnosis named, percent",
            [percent(one["diagnosis_named"]) for one in outcomes.values()],
        ),
        (
            "the same, without spoiled ones",
            [percent(one["without_spoiled"]["diagnosis_named"]) for one in _each(found)],
        ),
        (
            "questions before concluding",
            [figure(one["questions"], digits=2) for one in outcomes.values()],
        ),
        ("exchanges", [figure(one["exchanges"], digits=2) for one in outcomes.values()]),
        ("not concluded", [plain(one["not_concluded"]) for one in outcomes.values()]),
        ("spoiled by the patient", [plain(one["spoiled"]) for one in outcomes.values()]),
        *(
            (f"fault: {kind}", [plain(one["faults"].get(kind, 0)) for one in outcomes.values()])
            for kind in kinds
        ),
        *(
            (f"ended: {reason}", [plain(one["ends"].get(reason, 0)) for one in outcomes.values()])
            for reason in reasons
        ),
        ("left out", [plain(len(one["left_out"])) for one in _each(found)]),
    ]
    yield Table(caption="Outcomes, with 95 % intervals over cases", head=["", *outcomes], rows=rows)
    yield from _comparisons(found, models, groups="department")


def _each(found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return list(found["models"].values())


def _clinical(found: Mapping[str, Any], models: Sequence[str]) -> Iterator[Block]:
    by_model = found["models"]
    first = next(iter(by_model.values()))
    yield Note(
        text=f"{first['num_cases']} cases, {first['num_responses']} questions; history:"
        f" {first['history']}; scores from {first['scale'][0]} to {first['scale'][1]} with 95 %"
        f" intervals over cases; prompt {first['prompt_version']}."
    )
    names = ("fluency", "relevance", "completeness", "proficiency", "overall")
    rows: list[tuple[str, Sequence[Cell]]] = [
        (name, [figure(one[name], digits=2) for one in by_model.values()]) for name in names
    ]
    rows.append(("not judged", [plain(one["num_unjudged"]) for one in by_model.values()]))
    yield Table(head=["", *by_model], rows=rows)
    for model, one in by_model.items():
        yield _responses(model, one["responses"])


def _healthbench(found: Mapping[str, Any], models: Sequence[str]) -> Iterator[Block]:
    by_model = found["models"]
    first = next(iter(by_model.values()))
    yield Note(
        text=f"{first['num_rows']} rows, {first['num_criteria']} criteria; one call a"
        f" {first['calls']}; subset {first['subset']}; prompt {first['prompt_version']}. The mean"
        " is clipped to 0 and 1, not the rows; 95 % intervals over rows."
    )
    tags = dict.fromkeys(tag for one in by_model.values() for tag in one["tags"])
    rows: list[tuple[str, Sequence[Cell]]] = [
        ("score", [figure(one["score"]) for one in by_model.values()]),
        ("length-adjusted", [figure(one["length_adjusted"]) for one in by_model.values()]),
        ("criteria not judged", [plain(one["num_unjudged"]) for one in by_model.values()]),
        (
            "score if all were judged",
            [
                Cell(text=" to ".join(number(one) for one in each["score_if_all_were_judged"]))
                for each in by_model.values()
            ],
        ),
    ]
    yield Table(head=["", *by_model], rows=rows)
    for caption, folded in (("By axis and theme", False), ("By all other tags", True)):
        yield Table(
            caption=caption,
            folded=folded,
            head=["", *by_model],
            rows=[
                (tag, [figure(one["tags"].get(tag)) for one in by_model.values()])
                for tag in tags
                if tag.startswith(("axis:", "theme:")) != folded
            ],
        )
    for model, one in by_model.items():
        yield _responses(model, one["responses"])


def _clinic(found: Mapping[str, Any], models: Sequence[str]) -> Iterator[Block]:
    by_model = found["models"]
    yield Note(
        text=f"{found['num']} held-out prompts of the invented world (seed {found['seed']}), whose"
        " truth is known; shares in percent, scores from 1 to 5, 95 % intervals over prompts."
    )

    def cell(name: str, one: Mapping[str, Any] | None) -> Cell:
        return figure(one, digits=2) if name in ("informative", "overall") else percent(one)

    yield Table(
        head=["", *by_model],
        rows=[
            (words, [cell(name, one["figures"][name]) for one in by_model.values()])
            for name, words in _CLINIC.items()
        ],
    )
    if found["differences"]:
        yield Table(
            caption="Differences on the same prompts",
            head=["", *(f"{one['models'][0]} less {one['models'][1]}" for one in _pairs(found))],
            rows=[
                (words, [cell(name, one["figures"][name]) for one in _pairs(found)])
                for name, words in _CLINIC.items()
            ],
        )
    for model, one in by_model.items():
        yield _responses(model, one["responses"])


def _pairs(found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return list(found["differences"])


def _contamination(found: Mapping[str, Any]) -> Iterator[Block]:
    yield Note(
        text=f"Test texts that share 64 characters in a row with one of"
        f" {found['num_training_texts']} training texts ({', '.join(found['files'])}); shorter ones"
        " are looked for as a whole, and very short ones not at all."
    )
    yield Table(
        head=["", "texts", "overlap", "of them short", "too short to tell"],
        rows=[
            (
                name,
                [
                    plain(one["num"]),
                    plain(len(one["overlaps"])),
                    plain(one["num_short"]),
                    plain(one["num_unchecked"]),
                ],
            )
            for name, one in found["suites"].items()
        ],
    )
    for name, one in found["suites"].items():
        for test, shared in list(one["examples"].items())[:_EXAMPLES]:
            yield Note(
                text=f"{name}, {test}: shared with {shared[0]['source']}:"
                f" “{shared[0]['passage'][:120]}”",
                warning=True,
            )
    if found["num_unreadable_rows"]:
        yield Note(text=f"{found['num_unreadable_rows']} rows could not be read.", warning=True)


def _settings(result: Mapping[str, Any]) -> Iterator[Block]:
    for title, found in (
        *((f"Model {name}", one) for name, one in result["models"].items()),
        ("Judge", result["judge"]),
        ("Second judge", result["second_judge"]),
        ("Evaluation", result["settings"]),
        ("Versions", result["versions"]),
        ("Calls to servers, of all runs", result["calls"] or None),
    ):
        if found is not None:
            yield Table(
                caption=title,
                folded=True,
                head=["", ""],
                rows=[(name, [Cell(text=_told(value))]) for name, value in found.items()],
                kind="words",
            )


def _told(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_told(one)}" for name, one in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_told, value)) or ABSENT
    return ABSENT if value is None else str(value)
