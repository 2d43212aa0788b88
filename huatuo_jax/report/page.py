"""The page itself: head, contents, parts; one file that needs nothing beside it."""

import pathlib

from huatuo_jax.atomic import write_file
from huatuo_jax.report import consultations, outcome, sections
from huatuo_jax.report.costs import costs
from huatuo_jax.report.headline import headline
from huatuo_jax.report.markup import text
from huatuo_jax.report.run import Run, read_run
from huatuo_jax.report.style import STYLE

_CONTENTS = {
    consultations.SECTION: "Consultations",
    "release": "Release",
    "data": "Data",
    "curves": "Curves",
    "judge": "Judge",
    "reward": "Reward model",
    "ppo": "PPO",
    "evaluation": "Evaluation",
    "answers": "Answers",
    "costs": "Time and settings",
}


def write_report(
    workdir: pathlib.Path, output: pathlib.Path, *, title: str, num_prompts: int
) -> None:
    """Writes the report of what a run's folder holds, whole or not at all.

    Args:
        workdir: the run's folder.
        output: the page.
        title: its heading.
        num_prompts: prompts whose answers are shown.

    Raises:
        ValueError: a file of the run is no JSON.
        OSError: the page cannot be written.
    """
    page = make_page(read_run(workdir), title=title, num_prompts=num_prompts)
    write_file(output, page)


def make_page(run: Run, *, title: str, num_prompts: int) -> str:
    """The report as one HTML page; parts of stages that did not run are left out."""
    parts = [
        consultations.consultations(run),
        outcome.release(run),
        sections.data(run),
        sections.curves(run),
        sections.judge(run),
        sections.reward_model(run),
        outcome.ppo(run),
        outcome.evaluation(run),
        outcome.answers(run, num_prompts=num_prompts),
        costs(run),
    ]
    links = "".join(
        f'<a href="#{name}">{label}</a>'
        for name, label in _CONTENTS.items()
        if any(f'<section id="{name}">' in part for part in parts)
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head><body>"
        f"<header><div><h1>{text(title)}</h1><p>{text(_told(run))}</p><nav>{links}</nav></div>"
        f"</header><main>{headline(run)}{''.join(parts)}"
        "<footer>Made by huatuo_jax. A model of this run is no doctor, and nothing here is medical "
        "advice.</footer></main></body></html>\n"
    )


def _told(run: Run) -> str:
    finished = [entry["finished"] for entry in run.journal.values() if entry["finished"]]
    when = f", {max(finished)[:16].replace('T', ' ')} UTC" if finished else ""
    return f"Run {run.folder.name}{when}"
