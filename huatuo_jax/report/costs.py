"""The last part of a report: time and cost of each stage, settings and versions."""

from collections.abc import Mapping
from typing import Any

from huatuo_jax.report.markup import (
    details,
    number,
    paragraph,
    percent,
    seconds,
    section,
    table,
    text,
)
from huatuo_jax.report.run import Run


def costs(run: Run) -> str:
    """Time and cost of each stage, settings and versions."""
    rows = [
        [
            text(name),
            seconds(entry["seconds"]),
            number(len(entry["starts"])),
            text(entry["finished"] or "not finished"),
        ]
        for name, entry in run.journal.items()
    ]
    parts = [
        table(
            ["stage", "time", "starts", "finished (UTC)"],
            rows,
            caption="Time of a start that was killed is not counted",
        )
    ]
    if run.labels is not None:
        parts += [_spent(part) for part in run.labels["judges"]]
    for name, entry in run.journal.items():
        settings = run.config[name]["settings"] if name in run.config else entry["settings"]
        lines = [[f"<code>{text(k)}</code>", f"<code>{text(v)}</code>"] for k, v in _flat(settings)]
        parts.append(details(f"Settings of {name}", table(["field", "value"], lines, words=True)))
    if run.environment is not None:
        parts.append(details("Versions and machine", _environment(run.environment)))
    return section("costs", "Time, cost, settings, versions", *parts)


def _spent(part: Mapping[str, Any]) -> str:
    cost = part["cost"]
    usage = ", ".join(f"{text(k)} {number(v, digits=0)}" for k, v in cost["usage"].items())
    return paragraph(
        f"Judge {text(part['judge'])}: cost {number(cost['money'], digits=4)}"
        + (f" and {cost['unknown']} judgements of unknown cost" if cost["unknown"] else "")
        + f"; tokens: {usage or 'none'}; failed {percent(part['failure_rate']['value'])}."
    )


def _environment(found: Mapping[str, Any]) -> str:
    devices = found["devices"]
    rows = [
        ["python", text(found["python"])],
        ["platform", text(found["platform"])],
        ["devices", f"{devices['number']} × {text(devices['kind'])}"],
        ["commit", text(found["git_commit"] or "not in git")],
        *([text(name), text(version)] for name, version in found["packages"].items()),
    ]
    return table(["", ""], rows, words=True)


def _flat(settings: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(settings, Mapping):
        return [
            line
            for name, value in settings.items()
            for line in _flat(value, f"{path}.{name}" if path else str(name))
        ]
    return [(path, settings)]
