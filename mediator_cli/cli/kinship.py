"""`mediator kinship`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mediator_cli.cli.options import (
    JsonOption,
    MemoryOption,
    OfflineOption,
    QuietOption,
    RecipeArgument,
    SetOption,
    WorkersOption,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.text import Text

    from mediator_cli.pipeline.kinship import KinshipReport, PairKinship

_PICTURES = (".png", ".svg", ".pdf")
_NAMES = {"pcc": "Pearson correlation", "cosine": "cosine", "euclidean": "Euclidean distance"}
# From strangers to near relatives, dark to light text kept readable on each.
_SHADES = ((-1.0, "#f7fbff"), (0.1, "#d2e3f3"), (0.3, "#9ac8e0"), (0.5, "#fdd49e"), (0.7, "#fc8d59"), (0.9, "#d7301f"))


def kinship(
    recipe: RecipeArgument,
    metric: Annotated[
        Literal["pcc", "cosine", "euclidean"],
        typer.Option("--metric", help="What orders experts and proposes: Pearson correlation, cosine or distance."),
    ] = "pcc",
    int8: Annotated[
        bool, typer.Option("--int8", help="Round deltas to 8 bits first, as --low_precision of the authors' code does.")
    ] = False,
    split: Annotated[
        bool, typer.Option("--split", help="Measure each tensor by itself and take the mean by size, as theirs can.")
    ] = False,
    unsigned: Annotated[
        bool, typer.Option("--unsigned", help="Take the cosine without its sign, as the authors' code does.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write the report to a file, as JSON.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Also draw dendrogram and table: FILE.png, .svg or .pdf.")
    ] = None,
    changes: SetOption = None,
    memory: MemoryOption = "2GiB",
    workers: WorkersOption = None,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure how alike the experts' deltas are, pair by pair and layer by layer, and propose which to merge."""
    from mediator_cli.checkpoint.hub.find import Access
    from mediator_cli.cli.output import Told, print_json, say, write_text
    from mediator_cli.cli.progress import shown_progress
    from mediator_cli.cli.run import settings
    from mediator_cli.pipeline.kinship import KinshipForm, measure_experts
    from mediator_cli.plan.make import make_plan
    from mediator_cli.recipe.load import load_partly

    _check_plot(plot)
    made = make_plan(load_partly(recipe, changes or ()), Access(offline))
    told = Told(quiet)
    told.tell(*made.notices)
    with shown_progress(quiet) as progress:
        run = settings(memory, workers, progress=progress, notify=told.tell)
        report = measure_experts(made, run, KinshipForm(metric, int8, split, unsigned))
    told.tell(*report.notices)
    if output is not None:
        write_text(output, report.model_dump_json(indent=1) + "\n")
    if plot is not None:
        draw_kinship(plot, report)
    if as_json:
        print_json(report.model_dump(mode="json"))
    elif not quiet:
        print_kinship(report)
        written = [f"{what} written to {file}" for what, file in (("report", output), ("picture", plot)) if file]
        if written:
            say("; ".join(written))


def _check_plot(plot: Path | None) -> None:
    from mediator_cli.cli.heat.map import check_plot
    from mediator_cli.errors import OutputError, Problem

    if plot is not None and plot.suffix not in _PICTURES:
        message = f"kinship is drawn as a picture only, and '{plot.suffix}' is none"
        raise OutputError(Problem(str(plot), message, "use .png, .svg or .pdf"))
    check_plot(plot)


def print_kinship(report: KinshipReport) -> None:
    """Print the table of pairs, the units, and what follows from them in words."""
    from mediator_cli.cli.output import print_table, say

    say(f"kinship of {' and '.join(report.experts) if len(report.experts) == 2 else 'all pairs'}: {_how(report)}")
    if len(report.experts) == 2:
        print_table(("unit", "pcc#", "cosine#", "distance#"), _unit_rows_of_two(report))
    else:
        print_table(["", *(f"{name}#" for name in report.order)], _pair_rows(report))
        print_table(("unit", "mean#", "lowest#", "of", "highest#", "of"), _unit_rows(report))
        say(f"family tree: {_tree_words(report)}")
    for line in proposal_words(report):
        say(line)


def _how(report: KinshipReport) -> str:
    forms = (("rounded to 8 bits", report.int8), ("mean over tensors by size", report.split))
    return ", ".join([f"{_NAMES[report.metric]} of the deltas", *(word for word, is_on in forms if is_on)])


def _values(report: KinshipReport, pairs: Sequence[PairKinship]) -> dict[tuple[str, str], float | None]:
    """Give the metric of each pair, in both orders of its names."""
    found = {pair.experts: getattr(pair, report.metric) for pair in pairs}
    return {**found, **{(right, left): value for (left, right), value in found.items()}}


def _cell(report: KinshipReport, name: str, other: str) -> Text:
    from rich.text import Text

    value = None if name == other else _values(report, report.pairs)[name, other]
    if value is None:
        return Text("" if name == other else "–")
    if report.metric == "euclidean":
        return Text(_written(report, value))
    shade = next(colour for limit, colour in reversed(_SHADES) if value >= limit)
    return Text(_written(report, value), style=f"black on {shade}")


def _written(report: KinshipReport, value: float) -> str:
    return _distance(value) if report.metric == "euclidean" else f"{value:.3f}"


def _distance(value: float) -> str:
    """Write four digits, and more where they stand before the point.

    >>> _distance(20.69589), _distance(39621.7)
    ('20.7', '39622')
    """
    return f"{value:.0f}" if 1e4 <= value < 1e9 else f"{value:.4g}"


def _pair_rows(report: KinshipReport) -> Iterator[tuple[str | Text, ...]]:
    for name in report.order:
        yield (name, *(_cell(report, name, other) for other in report.order))


def _unit_rows_of_two(report: KinshipReport) -> Iterator[tuple[str, ...]]:
    for unit, (pair,) in (*report.units.items(), ("all", report.pairs)):
        both = ("–" if value is None else f"{value:.3f}" for value in (pair.pcc, pair.cosine))
        yield (unit, *both, "–" if pair.euclidean is None else _distance(pair.euclidean))


def _unit_rows(report: KinshipReport) -> Iterator[tuple[str, ...]]:
    for unit, pairs in (*report.units.items(), ("all", report.pairs)):
        known = [(getattr(p, report.metric), " + ".join(p.experts)) for p in pairs]
        ranked = sorted((value, names) for value, names in known if value is not None)
        if not ranked:
            yield (unit, "–", "–", "", "–", "")
            continue
        low, high = ranked[0], ranked[-1]
        mean = sum(value for value, _ in ranked) / len(ranked)
        yield (unit, _written(report, mean), _written(report, low[0]), low[1], _written(report, high[0]), high[1])


def _tree_words(report: KinshipReport) -> str:
    """Write the tree with brackets: what stands in the innermost ones is the nearest kin."""
    words: dict[tuple[str, ...], str] = {(name,): name for name in report.experts}
    for branch in report.tree:
        joined = f"({words[branch.left]}, {words[branch.right]} {_written(report, branch.kinship)})"
        words[branch.left + branch.right] = joined
    return words[report.tree[-1].left + report.tree[-1].right]


def proposal_words(report: KinshipReport) -> Iterator[str]:
    """Say which experts to merge, and why."""
    if not report.groups:
        yield "nothing is proposed: no pair has a kinship"
        return
    pair, most = report.groups[0], "largest" if report.metric == "euclidean" else "lowest"
    what = "distance" if report.metric == "euclidean" else "kinship"
    of_all = f", the {most} of all pairs" if len(report.pairs) > 1 else ""
    yield f"merge first: {' + '.join(pair.experts)}, {what} {_written(report, pair.kinship)}{of_all}"
    for group in report.groups[1:]:
        names = " + ".join(group.experts)
        yield f"{len(group.experts)} experts, chosen one by one: {names}, mean {what} {_written(report, group.kinship)}"
    yield "experts of low kinship have learned different things; near relatives gain little from each other"
    if any(pair.cosine is not None and pair.cosine < 0 for pair in report.pairs):
        yield "a cosine below 0: these deltas undo each other in part; `mediator analyze-conflicts` shows where"


def draw_kinship(file: Path, report: KinshipReport) -> None:
    """Draw the family tree above the table of pairs."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    n, values = len(report.order), _values(report, report.pairs)
    table = [[values.get((name, other)) for other in report.order] for name in report.order]
    numbers = [[float("nan") if value is None else value for value in row] for row in table]
    side = max(3.5, 0.7 * n + 1.5)
    figure, (top, below) = plt.subplots(
        2, 1, figsize=(side + 1, 1.5 * side), height_ratios=(1, 2), sharex=True, layout="constrained"
    )
    for xs, ys in tree_lines(report):
        top.plot(xs, ys, color="#08306b")
    top.set_ylabel(_NAMES[report.metric])
    if report.metric != "euclidean":
        top.invert_yaxis()
    limits = {} if report.metric == "euclidean" else {"vmin": -1, "vmax": 1}
    picture = below.imshow(numbers, aspect="auto", cmap="RdYlBu_r", **limits)
    below.set_xticks(range(n), report.order, rotation=45, ha="right")
    below.set_yticks(range(n), report.order)
    patch = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1.5}
    for y, row in enumerate(table):
        for x, value in enumerate(row):
            if value is not None:
                below.text(x, y, _written(report, value), ha="center", va="center", fontsize=8, bbox=patch)
    figure.colorbar(picture, ax=below, label=_how(report), shrink=0.8)
    figure.suptitle("Kinship of the experts' deltas")
    figure.savefig(file, bbox_inches="tight", dpi=120)
    plt.close(figure)


def tree_lines(report: KinshipReport) -> Iterator[tuple[list[float], list[float]]]:
    """Give the lines of the dendrogram, one bracket for each branch; leaves begin at no distance from themselves."""
    leaf = 0.0 if report.metric == "euclidean" else 1.0
    tops: dict[tuple[str, ...], tuple[float, float]]
    tops = {(name,): (float(at), leaf) for at, name in enumerate(report.order)}
    for branch in report.tree:
        (left, low), (right, other) = tops[branch.left], tops[branch.right]
        yield [left, left, right, right], [low, branch.kinship, branch.kinship, other]
        tops[branch.left + branch.right] = ((left + right) / 2, branch.kinship)
