"""Draws the report's plots as SVG elements for the page itself, with English labels."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Series = tuple[Sequence[float], Sequence[float]]

COLOURS = {"train": "#9fb3c4", "held out": "#0b6e69", "length": "#c77700", "other": "#3a6ea5"}
_SIZE = (4.6, 3.1)  # In inches: its type is 9 points on a phone's 390 pixels.


def curves(
    lines: Mapping[str, Series], *, name: str, x: str, y: str, bound: float | None = None
) -> str:
    """Draws lines over steps; one of over 60 points is drawn with its moving mean.

    Args:
        lines: by their name in the legend.
        name: of the plot, unlike any other of the page.
        x: of the horizontal axis.
        y: of the vertical axis.
        bound: a level to draw.
    """

    def draw(axes: "Axes") -> None:
        for (label, (steps, values)), colour in zip(
            lines.items(), _colours(len(lines)), strict=True
        ):
            if len(values) > 60:
                axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
                axes.plot(steps, _moving_mean(values), color=colour, label=label)
            else:
                axes.plot(steps, values, color=colour, marker="o", markersize=3, label=label)
        if bound is not None:
            axes.axhline(bound, color="#b00020", linestyle="--", linewidth=1, label="bound")
        axes.set(xlabel=x, ylabel=y)
        axes.locator_params(axis="x", integer=True)
        if len(lines) > 1 or bound is not None:
            axes.legend(frameon=False)

    return _svg(draw, name)


def scatter(
    xs: Sequence[float],
    ys: Sequence[float],
    *,
    name: str,
    x: str,
    y: str,
    colour_by: Sequence[float] | None = None,
    colour_name: str = "",
) -> str:
    """Draws points, coloured by a third number where one is given."""

    def draw(axes: "Axes") -> None:
        if colour_by is None:
            axes.scatter(xs, ys, s=14, alpha=0.6, color=COLOURS["held out"], linewidths=0)
        else:
            points = axes.scatter(xs, ys, s=20, c=colour_by, cmap="viridis", linewidths=0)
            axes.figure.colorbar(points, ax=axes, label=colour_name)
        axes.set(xlabel=x, ylabel=y)

    return _svg(draw, name)


def reward_and_judge(
    rows: Sequence[Mapping[str, float]], *, kept: int | None, name: str, x: str
) -> str:
    """Draws the reward and the judge's share of points over KL, in the order of iterations.

    Args:
        rows: of metrics, each of a judging (`judged/...`).
        kept: the iteration whose policy was kept, to be marked.
        name: of the plot, unlike any other of the page.
        x: of the horizontal axis.
    """

    def column(field: str) -> npt.NDArray[np.float64]:
        return np.array([row[f"judged/{field}"] for row in rows], np.float64)

    kl_N, reward_N, share_N = column("kl_per_sequence"), column("reward"), column("share")
    errors_2N = np.stack([share_N - column("share_low"), column("share_high") - share_N])

    def draw(reward: "Axes", judge: "Axes") -> None:
        style: Any = {"marker": "o", "markersize": 3.5, "linewidth": 1.2}
        reward.plot(kl_N, reward_N, color=COLOURS["other"], **style)
        reward.set(ylabel="reward")
        judge.axhline(0.5, color="#8a94a0", linestyle="--", linewidth=1)
        judge.errorbar(
            kl_N, share_N, yerr=errors_2N, color=COLOURS["held out"], capsize=2.5, **style
        )
        judge.set(xlabel=x, ylabel="judge's share of points")
        for row in rows:
            if row["step"] == kept:
                place = row["judged/kl_per_sequence"]
                for axes in (reward, judge):
                    axes.axvline(place, color=COLOURS["length"], linewidth=1, linestyle=":")
                mark: Any = {"marker": "*", "markersize": 10, "zorder": 5, "linestyle": "none"}
                mark["color"] = COLOURS["length"]
                label = f"kept: iteration {kept}"
                reward.plot([place], [row["judged/reward"]], label=label, **mark)
                judge.plot([place], [row["judged/share"]], **mark)
                reward.legend(frameon=False, loc="best")

    return _svg(draw, name, panels=2)


def clouds(groups: Mapping[str, Series], *, name: str, x: str, y: str) -> str:
    """Draws the points of several groups, each in its colour."""

    def draw(axes: "Axes") -> None:
        for (label, (xs, ys)), colour in zip(groups.items(), _colours(len(groups)), strict=True):
            axes.scatter(xs, ys, s=12, alpha=0.55, color=colour, label=label, linewidths=0)
        axes.set(xlabel=x, ylabel=y)
        axes.legend(frameon=False)

    return _svg(draw, name)


def reliability(report: Mapping[str, Any], *, name: str) -> str:
    """Draws the reward model's agreement at each confidence, beside that of length alone."""

    def draw(axes: "Axes") -> None:
        axes.plot([0.5, 1], [0.5, 1], color="0.7", linestyle="--", label="calibrated")
        for label, calibration, colour in (
            ("reward model", report["calibration"], COLOURS["held out"]),
            ("length only", report["length_baseline"]["calibration"], COLOURS["length"]),
        ):
            bins = calibration["bins"]
            places = [one["confidence"] for one in bins]
            shares = [one["agreement"] for one in bins]
            sizes = [10 + 60 * one["num_pairs"] / report["num_pairs"] for one in bins]
            axes.plot(places, shares, color=colour, label=label)
            axes.scatter(places, shares, s=sizes, color=colour, linewidths=0)
        axes.set(
            xlabel="confidence in the preferred answer",
            ylabel="share of labels that agree",
            xlim=(0.49, 1.01),
            ylim=(0.0, 1.03),
        )
        axes.legend(frameon=False, loc="lower right")

    return _svg(draw, name)


def _colours(count: int) -> list[str]:
    own = [COLOURS["train"], COLOURS["held out"], COLOURS["length"], COLOURS["other"]]
    return own[1:2] if count == 1 else own[:count]


def _moving_mean(values: Sequence[float]) -> list[float]:
    width = max(3, len(values) // 25)
    sums = np.cumsum([0.0, *values])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    return ((sums[ends] - sums[starts]) / (ends - starts)).tolist()


def _svg(draw: Any, name: str, *, panels: int = 1) -> str:
    """Returns a drawing as an `svg` element whose ids start with the plot's name.

    Args:
        draw: is called with the axes of each panel, which share their horizontal axis.
        name: of the plot.
        panels: one above the other.
    """
    # Imported here: it is slow to, and only a report needs it.
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#eceff2",
        "axes.axisbelow": True,
        "axes.formatter.useoffset": False,
        "axes.edgecolor": "#8a94a0",
    }
    with matplotlib.rc_context(settings):
        width, height = _SIZE
        figure = Figure(figsize=(width, height * (1 + panels) / 2), layout="constrained")
        FigureCanvasSVG(figure)
        draw(*figure.subplots(panels, sharex=True, squeeze=False)[:, 0])
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
    drawn = re.sub(r'\b(id="|xlink:href="#|url\(#)', rf"\g<1>{name}-", drawn)
    return drawn.replace("<svg ", f'<svg role="img" aria-label="{name}" ', 1)
