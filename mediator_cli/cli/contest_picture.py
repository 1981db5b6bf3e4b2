"""A contest as a picture, by matplotlib: accuracy against time, against memory, and by the number of experts kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mediator_cli.cli.contest_charts import COLOURS, Y_NAME, curves, scatters
from mediator_cli.cli.scatter import place_labels

if TYPE_CHECKING:
    from pathlib import Path

    from mediator_cli.cli.contest_charts import Chart
    from mediator_cli.compare.contest_report import ContestReport

_MARKERS = {"reference": "D", "ensemble": "s", "merge": "^", "route": "o"}
_STYLES = ("-", "--", ":", "-.", (0, (1, 3)))
_WIDE, _HIGH = 1000, 520
"""The canvas on which labels are placed, in pixels of an inch's hundredth."""


def draw_contest(file: Path, report: ContestReport) -> None:
    """Draw all charts below each other; the ending of the file says in which format."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    charts = scatters(report)
    kinds = list(dict.fromkeys(each.kind for each in report.selection))
    heights = [5.6] * len(charts) + [3.4] * bool(kinds)
    figure = plt.figure(figsize=(10.5, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for chart, part in zip(charts, parts, strict=False):
        _scatter(part.subplots(), chart)
    if kinds:
        _all_curves(parts[-1].subplots(1, len(kinds), sharey=True, squeeze=False)[0], report, kinds)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _scatter(axes: Any, chart: Chart) -> None:  # noqa: ANN401 - matplotlib's Axes
    for group, (colour, _) in COLOURS.items():
        own = [spot for spot in chart.spots if spot.kind == group]
        if own:
            errors = [spot.error or 0 for spot in own]
            xs, ys = [spot.x for spot in own], [spot.y for spot in own]
            axes.errorbar(xs, ys, errors, fmt="none", ecolor=colour, alpha=0.35, linewidth=1)
            axes.scatter(xs, ys, c=colour, marker=_MARKERS[group], s=34, label=group, zorder=3)
    front = sorted((spot.x, spot.y) for spot in chart.spots if spot.is_front)
    axes.plot(*zip(*front, strict=True), "k--", linewidth=1, alpha=0.55, label="none cheaper and better")
    axes.set_xscale("log" if chart.x.is_log else "linear")
    axes.set(xlim=(chart.x.low, chart.x.high), ylim=(chart.y.low, chart.y.high), xlabel=chart.x_name, ylabel=Y_NAME)
    axes.set_xticks(chart.x.ticks, [f"{tick:g}" for tick in chart.x.ticks])
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
    axes.set_title(chart.title, loc="left")
    axes.legend(fontsize=8)
    _label(axes, chart)


def _label(axes: Any, chart: Chart) -> None:  # noqa: ANN401 - matplotlib's Axes
    shares = [(chart.x.share(spot.x), chart.y.share(spot.y)) for spot in chart.spots]
    points = [(x * _WIDE, (1 - y) * _HIGH) for x, y in shares]
    labels = place_labels([spot.name for spot in chart.spots], points, _WIDE, _HIGH)
    for spot, label in zip(chart.spots, labels, strict=True):
        axes.annotate(
            spot.name, (spot.x, spot.y), (label.x / _WIDE, 1 - label.y / _HIGH), textcoords="axes fraction",
            ha="center", va="center", fontsize=7, arrowprops={"arrowstyle": "-", "alpha": 0.3, "linewidth": 0.5},
        )  # fmt: skip


def _all_curves(row: Any, report: ContestReport, kinds: list[str]) -> None:  # noqa: ANN401 - matplotlib's Axes
    for axes, kind in zip(row, kinds, strict=True):
        for at, line in enumerate(curves(report.selection, kind)):
            ks, ys = zip(*line.points, strict=True)
            axes.plot(range(len(ks)), ys, color=COLOURS[kind][0], linestyle=_STYLES[at % len(_STYLES)], label=line.name)
            axes.set_xticks(range(len(ks)), [str(k) for k in ks])
        axes.set(title=kind, xlabel="experts kept")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    row[0].set_ylabel(Y_NAME)
