"""The page and the plot of the experiment on the paper's claims, made of its figures alone."""

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from paper_claims_figures import SHARE, seeds_below
from paper_claims_parts import BOTH, TITLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]

MODELS = {
    "sft": "SFT",
    "best_of_n": "SFT, best of n by the reward model",
    "ppo": "SFT, then RLAIF",
    "reference": "the doctor's own answers",
}
COLUMNS = {
    "diagnosis_accuracy": "right diagnosis",
    "informativeness": "informative",
    "friendliness": "friendly",
    "asks_when_needed": "asks where needed",
    "contraindicated": "contra-indicated order",
    "red_flag_missed": "red flag missed",
    "overall": "overall",
    "kl": "KL from SFT, nats",
    "length": "characters",
}
NAMES = {
    **COLUMNS,
    SHARE: "share of points",
    "informativeness": "informativeness",
    "friendliness": "friendliness",
}
DIGITS = {"kl": 1, "length": 0}
VERDICTS = {
    "holds": "holds here",
    "does not hold": "does not hold here",
    "undecided": "undecided: these seeds do not tell",
}
UNIT = (
    "Informative, friendly and overall are scores of 1 to 5; right diagnosis, asks where needed, "
    "contra-indicated order and red flag missed are shares of the answers for which the question "
    "arises."
)
PAPER = """\
[HuatuoGPT](https://arxiv.org/abs/2305.15075) (EMNLP Findings 2023, 725) fine-tunes a language model
on two kinds of data: answers distilled from ChatGPT, which are detailed, friendly and in good order
but not those of a doctor, and answers of real doctors, which are short, exact, and ask back. It
holds that the two make up for what the other lacks, and that a reward model of AI feedback, which
sees the doctor's answer, lets a model keep the merits of both (RLAIF; the EMNLP version says RLMF).

What the paper shows for it are comparisons of the whole recipe with other models: before GPT-4,
HuatuoGPT wins, ties and loses 47, 21 and 32 of 100 single-turn questions against ChatGPT, and 62, 6
and 32 of 100 multi-turn consultations. Its BLEU-1 is 27.39 on cMedQA2, 24.85 on webMedQA and 27.42
on Huatuo-26M; ROUGE-L 15.46, 14.50 and 15.84. None of these can say whether an answer is true.
"""


def page(found: Mapping[str, Any], *, plot: str) -> str:
    """The page as Markdown.

    Args:
        found: the tables by name, as the file of figures holds them.
        plot: its address from the page.

    Raises:
        ValueError: there is no table.
    """
    if not {"claims", "contributions"} & set(found):
        raise ValueError("the file of figures has no table: run the experiment first")
    parts = ["# The paper's claims, where the truth is known", PAPER]
    if "claims" in found:
        parts += _claims(found["claims"], plot)
    if "contributions" in found:
        parts += _contributions(found["contributions"])
    return "\n\n".join(part.strip() for part in parts) + "\n"


def drawn(table: Mapping[str, Any]) -> bytes:
    """Diagnosis and friendliness of all models, a line each, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = list(reversed(table["rows"]))
    figure = Figure(figsize=(10, 1.4 + 0.42 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    _dots(panels[0], rows, "diagnosis_accuracy", "share of answers with the right diagnosis")
    _dots(panels[1], rows, "friendliness", "friendliness, 1 to 5")
    panels[0].set_yticks(range(len(rows)), [_row_name(row) for row in rows], fontsize=9)
    figure.supxlabel(
        "mean over seeds and its 95 % t-interval; small dots are single seeds", fontsize=9
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def interval(figure: Row | None, *, digits: int = 2, signed: bool = False) -> str:
    """A mean and its interval over seeds, as text."""
    if figure is None:
        return "none"
    form = f"{'+' if signed else ''}.{digits}f"
    value = f"{figure['mean']:{form}}"
    if figure["low"] is None:
        return f"{value} (one seed)"
    return f"{value} ({figure['low']:{form}} to {figure['high']:{form}})"


def _claims(table: Mapping[str, Any], plot: str) -> list[str]:
    rows = [
        [_row_name(row), *(_cell(row["figures"], name) for name in COLUMNS)]
        for row in table["rows"]
    ]
    return [
        "## What came out here",
        _made_with(table),
        _table(
            ["the paper", "in the clinic"],
            [[claim["paper"], f"**{VERDICTS[claim['verdict']]}**"] for claim in table["claims"]],
        ),
        *(_claim(claim) for claim in table["claims"]),
        "## Outcomes",
        f"![Right diagnoses and friendliness of all models]({plot})",
        _table(["", *COLUMNS.values()], rows),
        f"{UNIT} Each figure is a mean over seeds with its 95 % t-interval.",
        "## Comparisons",
        "The judge's share of points (1 for a win, 1/2 for a tie), and differences by prompt:",
        _comparisons(table, ("diagnosis_accuracy", "friendliness", "asks_when_needed", "overall")),
        "## Each seed",
        "Shares of right diagnoses, each with the 95 % interval of a bootstrap over prompts:",
        _by_seed(table["rows"], "diagnosis_accuracy", _row_name),
        "## The controls",
        _controls(table),
    ]


def _contributions(table: Mapping[str, Any]) -> list[str]:
    against = {tuple(row["one"]): row for row in table["comparisons"] if row["other"][1] == "sft"}
    default = {tuple(row["other"]): row for row in table["comparisons"] if row["other"][1] != "sft"}
    rows = []
    for row in table["rows"]:
        if row["model"] != "ppo":
            continue
        key = (row["part"], "ppo")
        figures = against[key]["figures"]
        gain = figures["diagnosis_accuracy"]
        below = None if gain is None else seeds_below(gain)
        own = default[key]["figures"]["diagnosis_accuracy"] if key in default else None
        rows.append(
            [
                row["title"],
                interval(gain, signed=True),
                "none" if below is None else f"{below['value']} ({below['interval']})",
                "" if row["part"] == BOTH else interval(own, signed=True),
                interval(figures[SHARE]),
                interval(row["figures"]["kl"], digits=1),
                interval(row["figures"]["length"], digits=0),
            ]
        )
    head = [
        "",
        "right diagnoses, RLAIF - SFT",
        "seeds below SFT (with the whole interval)",
        "today's settings - these",
        "share of points against SFT",
        "KL, nats",
        "characters",
    ]
    changes = [
        f"{one['title']} ({_changes(one)})" for one in table["parts"].values() if one["changes"]
    ]
    left_out = ", ".join(name.replace("_", " ") for name in table["not_in_the_card"])
    return [
        "## What each setting contributes",
        "All rows begin with the same SFT model, prompts, answers and number of verdicts as "
        "today's settings; each undoes one of them alone.",
        _made_with(table),
        _table(head, rows),
        *([f"What each row changes: {'; '.join(changes)}."] if changes else []),
        *([f"Not in the card, and so in no row: {left_out}."] if left_out else []),
        "Right diagnoses of each seed, RLAIF - SFT, with the 95 % interval of a bootstrap over "
        "prompts:",
        _by_seed(list(against.values()), "diagnosis_accuracy", lambda row: _title(table, row)),
    ]


def _claim(claim: Row) -> str:
    lines = [f"### {claim['paper']}", "", f"Verdict: {VERDICTS[claim['verdict']]}.", ""]
    for one in claim["conditions"]:
        difference = one["figure"] != SHARE
        what = f"difference in {NAMES[one['figure']]}" if difference else NAMES[one["figure"]]
        lines.append(
            f"- {_model_name(one['one'])}, against {_model_name(one['other'])}: {what} "
            f"{interval(one['found'], signed=difference)}, to be above {one['bound']:g}: "
            f"{one['verdict']}"
        )
    return "\n".join(lines)


def _controls(table: Mapping[str, Any]) -> str:
    """What PPO came to with a reward that is known to be wrong, beside what it came to."""
    rows = {(row["part"], row["model"]): row["figures"] for row in table["rows"]}
    own = rows.get((BOTH, "ppo"))
    lines = [
        "A reward that is known to be wrong shows what the figures look like when RLAIF learns "
        "something else. On the same SFT model:",
        "",
    ]
    for (part, model), figures in rows.items():
        changes = table["parts"][part]["changes"]
        if model == "ppo" and changes and own is not None:
            told = _changes(table["parts"][part])
            lines.append(
                f"- {table['parts'][part]['title']} ({told}): right diagnosis "
                f"{_cell(figures, 'diagnosis_accuracy')} against "
                f"{_cell(own, 'diagnosis_accuracy')} of the recipe, overall "
                f"{_cell(figures, 'overall')} against {_cell(own, 'overall')}, characters "
                f"{_cell(figures, 'length')} against {_cell(own, 'length')}"
            )
    return "\n".join(lines) if len(lines) > 2 else "None was run."


def _changes(part: Row) -> str:
    """The fields that a part changes, as code."""
    return ", ".join(f"`{name}={value}`" for name, value in part["changes"].items())


def _made_with(table: Mapping[str, Any]) -> str:
    """Sizes, versions, time, and which intervals these are."""
    sizes = table["settings"]["clinic"]["sizes"]
    settings, versions = table["settings"], table["versions"]
    packages = ", ".join(f"{name} {version}" for name, version in versions["packages"].items())
    seeds = max((f["num_seeds"] for row in table["rows"] for f in _known(row)), default=0)
    tiny = "**Sizes to try it out: these figures say nothing.** " if table["tiny"] else ""
    return (
        f"{tiny}{seeds} seeds, each with a clinic of its own: {sizes['dialogues']} dialogues, "
        f"{sizes['prompts']} prompts with {settings['answers']['num_samples']} answers each to "
        f"learn from, {sizes['held_out_prompts']} held-out prompts, of which PPO's judgings may "
        f"take some for themselves. All fine-tuning takes as many "
        f"updates, so that the fewer dialogues of one kind alone are seen more often. Truth, "
        f"scores and points are the exact judge's of the clinic, whoever judged the labels. "
        f"Figures of a seed have the interval of a bootstrap over prompts; figures over seeds are "
        f"the mean with the "
        f"95 % interval of Student's t. A condition holds where its interval lies above the bound, "
        f"does not hold where it lies below, and is undecided otherwise. "
        f"{table['minutes_in_all']:.0f} minutes in all on {versions['cores']} cores "
        f"({versions['devices']['kind']}); Python "
        f"{versions['python']}, {packages}, commit {versions['git_commit']}."
    )


def _comparisons(table: Mapping[str, Any], outcomes: Sequence[str]) -> str:
    rows = [
        [
            _model_name(row["one"]),
            _model_name(row["other"]),
            interval(row["figures"][SHARE]),
            *(interval(row["figures"][name], signed=True) for name in outcomes),
        ]
        for row in table["comparisons"]
    ]
    return _table(["", "against", NAMES[SHARE], *(NAMES[name] for name in outcomes)], rows)


def _by_seed(rows: Sequence[Row], name: str, named: Any) -> str:
    seeds = sorted({seed for row in rows for seed in _seeds(row, name)}, key=int)
    body = [
        [named(row), *(_of_seed(_seeds(row, name).get(seed)) for seed in seeds)] for row in rows
    ]
    return _table(["", *(f"seed {seed}" for seed in seeds)], body)


def _seeds(row: Row, name: str) -> Mapping[str, Row]:
    figure = row["figures"][name]
    return {} if figure is None else figure["seeds"]


def _of_seed(one: Row | None) -> str:
    return "none" if one is None else f"{one['value']:.2f} ({one['low']:.2f} to {one['high']:.2f})"


def _cell(figures: Mapping[str, Any], name: str) -> str:
    figure = figures[name]
    return "" if figure is None else interval(figure, digits=DIGITS.get(name, 2))


def _known(row: Row) -> Iterable[Row]:
    return (figure for figure in row["figures"].values() if figure is not None)


def _row_name(row: Row) -> str:
    if row["model"] == "reference":
        return MODELS["reference"]
    return f"{row['title']}: {MODELS[row['model']]}"


def _model_name(model: Sequence[str]) -> str:
    part, name = model
    return f"{TITLES.get(part, part.replace('_', ' '))}: {MODELS[name]}"


def _title(table: Mapping[str, Any], row: Row) -> str:
    return str(table["parts"][row["one"][0]]["title"])


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [_line(head), _line(["---"] * len(head)), *(map(_line, rows))]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _dots(axes: "Axes", rows: Sequence[Row], name: str, title: str) -> None:
    """A row of the table a line: its seeds, and the mean with its interval."""
    colours = {
        "sft": "#3a6ea5",
        "best_of_n": "#b0682a",
        "ppo": "#0b6e69",
        "reference": "#8a94a0",
    }
    for place, row in enumerate(rows):
        figure = row["figures"][name]
        if figure is None:
            continue
        colour = colours[row["model"]]
        values = [one["value"] for one in figure["seeds"].values()]
        axes.plot(values, [place] * len(values), "o", color=colour, markersize=3, alpha=0.35)
        mean = figure["mean"]
        if figure["low"] is not None:
            axes.plot([figure["low"], figure["high"]], [place, place], color=colour, linewidth=2)
        axes.plot([mean], [place], "D", color=colour, markersize=6)
    axes.set_title(title, fontsize=10)
    axes.grid(axis="x", color="#eceff2")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
