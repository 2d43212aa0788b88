"""Renders a run's report: one HTML page that needs nothing beside it.

The text and the markup of each section are a Jinja template of `templates/`, which gets what
`sections` has gathered for it; everything put into a template is escaped.
"""

import functools
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from huatuo_jax.core.files import write_file
from huatuo_jax.data.records import is_empty
from huatuo_jax.report import sections
from huatuo_jax.report.run import Run, read_run

Section = Callable[[Run], dict[str, Any] | None]


class _Part(NamedTuple):
    """A section of the page.

    Attributes:
        id: of its element, and its template's name.
        label: in the contents.
        gather: returns the template's values; None where the run has nothing to show.
    """

    id: str
    label: str
    gather: Section


_PARTS = (
    _Part("consultations", "Consultations", sections.consultations),
    _Part("release", "Release", sections.release),
    _Part("synthesis", "Synthesis", sections.synthesis),
    _Part("data", "Data", sections.data),
    _Part("curves", "Curves", sections.curves),
    _Part("judge", "Judge", sections.judge),
    _Part("reward", "Reward model", sections.reward_model),
    _Part("ppo", "PPO", sections.ppo),
    _Part("evaluation", "Evaluation", sections.evaluation),
    _Part("suites", "Suites", sections.suites),
)
_COSTS = _Part("costs", "Time and settings", sections.costs)


def write_report(
    workdir: pathlib.Path, output: pathlib.Path, *, title: str, num_prompts: int
) -> None:
    """Writes the report of a run's folder, whole or not at all.

    Args:
        workdir: the run's folder.
        output: the page.
        title: its heading.
        num_prompts: prompts whose answers are shown.

    Raises:
        ValueError: a file of the run is not JSON.
        OSError: the page cannot be written.
    """
    page = make_page(read_run(workdir), title=title, num_prompts=num_prompts)
    write_file(output, page)


def make_page(run: Run, *, title: str, num_prompts: int) -> str:
    """Returns the report as one HTML page; sections of stages that did not run are left out."""
    answers = _Part("answers", "Answers", lambda run: sections.answers(run, num_prompts))
    shown = []
    for part in (*_PARTS, answers, _COSTS):
        values = part.gather(run)
        if values is not None:
            html = render(part.id, **values)
            shown.append({"id": part.id, "label": part.label, "html": html})
    return render(
        "page",
        title=title,
        run_line=_run_line(run),
        headline=render("headline", **sections.headline(run)),
        sections=shown,
    )


def render(name: str, **values: Any) -> Markup:
    """Renders a template of `templates/`; values are escaped unless they are `Markup`."""
    return Markup(environment().get_template(f"{name}.jinja").render(**values))


def _run_line(run: Run) -> str:
    finished = [entry["finished"] for entry in run.journal.values() if entry["finished"]]
    when = f", {max(finished)[:16].replace('T', ' ')} UTC" if finished else ""
    # The stage that writes this page has not finished while it does.
    running = [
        name for name, entry in run.journal.items() if name != "report" and not entry["finished"]
    ]
    unfinished = f"; not finished yet: {', '.join(running)}" if running else ""
    return f"Run {run.folder.name}{when}{unfinished}"


def _shown(value: float | int | None, digits: int) -> str | None:
    """Returns a number with `digits` digits after the point; None for None, NaN and infinity."""
    if value is None or not math.isfinite(value):
        return None
    is_whole = isinstance(value, int) or (value.is_integer() and abs(value) >= 1000)
    shown = f"{value:,.0f}" if is_whole else f"{value:,.{digits}f}"
    return shown.replace("-", "\u2212")  # A minus that is as wide as a digit.


def _minutes(seconds: float) -> str:
    """Returns a duration of a minute or more."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _versus(pair: str) -> str:
    """Returns a pair of models, `ppo_over_sft`, with their names."""
    one, other = pair.split("_over_")
    return f"{sections.NAMES[one]} over {sections.NAMES[other]}"


@functools.cache
def environment() -> jinja2.Environment:
    """Returns the environment of the templates, which escapes every value."""
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).with_name("templates")),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: Mapping[str, Callable[..., Any]] = {
        "shown": _shown,
        "exact": repr,
        "minutes": _minutes,
        "versus": _versus,
        "short": lambda value: f"{value:g}",
    }
    found.filters |= filters
    found.globals["names"] = sections.NAMES
    found.tests["empty_text"] = is_empty
    return found
