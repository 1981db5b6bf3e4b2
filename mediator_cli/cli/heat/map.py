"""The conflict heat map: in the terminal, as a page, and as a picture through matplotlib."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from mediator_cli.cli.heat.words import short_kind
from mediator_cli.cli.output import console, print_table, say, write_text
from mediator_cli.errors import OutputError, Problem

if TYPE_CHECKING:
    from pathlib import Path

    from rich.text import Text

    from mediator_cli.bundle.conflict_report import ConflictReport
    from mediator_cli.pipeline.conflicts import Preview
    from mediator_cli.plan.model import Plan

_PAGE = ".html"
_PICTURES = (".png", ".svg", ".pdf")
_WIDE = 120
# From agreement to conflict, dark to light text kept readable on each.
_SHADES = ((0.0, "#f7fbff"), (0.1, "#d2e3f3"), (0.2, "#9ac8e0"), (0.3, "#fdd49e"), (0.4, "#fc8d59"), (0.5, "#d7301f"))


def check_plot(plot: Path | None) -> None:
    """Raise OutputError before any work when the picture could not be drawn."""
    if plot is None:
        return
    if plot.suffix not in (*_PICTURES, _PAGE):
        hint = f"use {', '.join(_PICTURES)} or {_PAGE}"
        raise OutputError(Problem(str(plot), f"'{plot.suffix}' is not a picture format", hint))
    if plot.suffix != _PAGE and importlib.util.find_spec("matplotlib") is None:
        hint = "pip install 'mediator-merge[plot]', or give a name that ends with .html"
        raise OutputError(Problem("--plot", "pictures need matplotlib", hint))
    if not plot.absolute().parent.is_dir():
        raise OutputError(Problem(str(plot), "no such folder", "create it first"))


def write_report(file: Path, report: ConflictReport) -> None:
    """Write the report beside its place, then rename it."""
    from mediator_cli.bundle.manifest import to_json

    write_text(file, to_json(report))


def draw(file: Path, plan: Plan, report: ConflictReport, preview: Preview) -> None:
    """Draw the heat map in the form that the file's name asks for."""
    if file.suffix != _PAGE:
        draw_heat_map(file, report, preview)
        return
    from mediator_cli.cli.heat.page import heat_page

    write_text(file, heat_page(plan, report, preview))


def _cell(value: float | None) -> Text:
    from rich.text import Text

    if value is None:
        return Text("")
    shade = next(colour for limit, colour in reversed(_SHADES) if value >= limit)
    return Text(f"{100 * value:3.0f}", style=f"black on {shade}")


def _shown_beside() -> tuple[str, ...]:
    """Name the other scores that are shown: none on a narrow terminal."""
    return ("any", "cosine", "overlap") if console().width >= _WIDE else ()


def _beside(preview: Preview) -> list[tuple[str, ...]]:
    if not _shown_beside():
        return [() for _ in preview.all_scores]
    return [
        ("", "", "") if s is None else (f"{100 * s.any_sign:.1f}", f"{100 * s.cosine:.1f}", f"{100 * s.overlap:.1f}")
        for s in preview.all_scores
    ]


def _scores(preview: Preview) -> list[str]:
    """Write the score of each row, with its bound where it is an estimate."""
    shown = ["" if score is None else f"{100 * score:.1f}" for score in preview.scores]
    if not preview.bounds:
        return shown
    pairs = zip(shown, preview.bounds, strict=True)
    return [score if bound is None or not score else f"{score} ±{100 * bound:.1f}" for score, bound in pairs]


def print_heat_map(report: ConflictReport, preview: Preview) -> None:
    """Print conflict by layer and module kind in percent, then the assignment that the recipe gives."""
    table = preview.table
    rows: list[tuple[str | Text, ...]] = [
        (row, *(_cell(value) for value in values), score, *beside, decision)
        for row, values, score, beside, decision in zip(
            table.rows, table.values, _scores(preview), _beside(preview), preview.decisions, strict=True
        )
    ]
    what = "conflict"
    if report.sample is not None:
        what = f"estimate, from {100 * report.sample.share:.3g} % of the weights, of conflict"
    say(f"{what} ({preview.measure}, in %) between {', '.join(report.experts)}; denoise {report.denoise}")
    columns = [f"{short_kind(kind)}#" for kind in table.columns]
    print_table(("layer", *columns, "score#", *(f"{name}#" for name in _shown_beside()), "assignment"), rows)
    say("0 = all signs agree, 50 = signs are as in independent random deltas")
    if report.sample is not None:
        say("±: in 95 of 100 samples, the score of all weights is as near; thresholds are taken as found in the sample")
    if _shown_beside():
        say(
            "any: any two experts disagree; cosine: of raw deltas; overlap: changed by both, of those changed by either"
        )


def draw_heat_map(file: Path, report: ConflictReport, preview: Preview) -> None:
    """Draw the heat map with the score of each layer beside it."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    table = preview.table
    values = [[float("nan") if value is None else value for value in row] for row in table.values]
    height = max(3.0, 0.26 * len(table.rows) + 1.6)
    figure, (left, right) = plt.subplots(
        1,
        2,
        figsize=(4.5 + 0.7 * len(table.columns), height),
        width_ratios=(len(table.columns), 3),
        sharey=True,
        layout="constrained",
    )
    picture = left.imshow(values, aspect="auto", cmap="RdYlBu_r", vmin=0, vmax=0.6)
    left.set_xticks(range(len(table.columns)), [short_kind(kind) for kind in table.columns], rotation=45, ha="right")
    left.set_yticks(range(len(table.rows)), table.rows)
    figure.colorbar(picture, ax=left, label=f"conflict ({preview.measure})", shrink=0.6)
    # Points, not bars: layers differ by little, and a bar that does not start at zero misleads.
    inside = [n for n, row in enumerate(table.values) if any(value is not None for value in row)]
    colours = ["#d7301f" if preview.decisions[n].startswith("route") else "#4292c6" for n in inside]
    right.scatter([preview.scores[n] or 0.0 for n in inside], inside, c=colours)
    right.grid(axis="x", alpha=0.4)
    right.set_xlabel("score of the layer\nred: routed, blue: averaged")
    what = "Conflict" if report.sample is None else "Estimate of the conflict"
    figure.suptitle(f"{what} between {', '.join(report.experts)}")
    figure.savefig(file, bbox_inches="tight", dpi=120)
    plt.close(figure)
