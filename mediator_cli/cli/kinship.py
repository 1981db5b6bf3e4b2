"""`mediator kinship`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mediator_cli.cli.dendrogram import dendrogram
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

    from mediator_cli.pipeline.kinship import Answers, KinshipReport, PairKinship
    from mediator_cli.pipeline.settings import Settings
    from mediator_cli.plan.model import Plan

_PICTURES = (".png", ".svg", ".pdf")
_NAMES = {
    "pcc": "Pearson correlation",
    "cosine": "cosine",
    "euclidean": "Euclidean distance",
    "overlap": "overlap of subspaces",
    "output": "Jensen-Shannon divergence of answers",
}
_DISTANCES = ("euclidean", "output")
_TABLE, _SHOWN = 12, 8
"""Experts up to which all pairs are a table; pairs, and sizes of groups, that are listed beyond."""
# From strangers to near relatives, dark to light text kept readable on each.
_SHADES = ((-1.0, "#f7fbff"), (0.1, "#d2e3f3"), (0.3, "#9ac8e0"), (0.5, "#fdd49e"), (0.7, "#fc8d59"), (0.9, "#d7301f"))


def kinship(
    recipe: RecipeArgument,
    metric: Annotated[
        Literal["pcc", "cosine", "euclidean", "overlap", "output"],
        typer.Option(
            "--metric",
            help="What orders experts and proposes: Pearson correlation, cosine or distance of deltas; overlap of "
            "adapters' subspaces; distance of answers to --rows.",
        ),
    ] = "pcc",
    rows: Annotated[
        list[Path] | None,
        typer.Option("--rows", help="JSON lines of prompt and answer: also compare the experts' answers; repeatable."),
    ] = None,
    positions: Annotated[
        int, typer.Option("--positions", min=1, help="Tokens of the rows at which answers are compared, at most.")
    ] = 512,
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
    from mediator_cli.checkpoint.hub.collections import collection_lister
    from mediator_cli.checkpoint.hub.find import Access
    from mediator_cli.cli.output import Told, print_json, say, write_text
    from mediator_cli.cli.progress import shown_progress
    from mediator_cli.cli.run import settings
    from mediator_cli.pipeline.kinship import KinshipForm, measure_experts
    from mediator_cli.plan.make import make_plan
    from mediator_cli.recipe.load import load_partly

    _check_plot(plot)
    files = _check_rows(rows or (), metric)
    access = Access(offline)
    made = make_plan(load_partly(recipe, changes or (), collection_lister(access)), access)
    told = Told(quiet)
    told.tell(*made.notices)
    with shown_progress(quiet) as progress:
        run = settings(memory, workers, progress=progress, notify=told.tell)
        answers = _compare_answers(made, files, run, positions)
        report = measure_experts(made, run, KinshipForm(metric, int8, split, unsigned), answers)
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


def _check_rows(files: Sequence[Path], metric: str) -> Sequence[Path]:
    from mediator_cli.errors import OutputError, Problem

    if metric == "output" and not files:
        raise OutputError(Problem("--metric output", "compares answers, and there is nothing to answer", "add --rows"))
    return files


def _compare_answers(plan: Plan, files: Sequence[Path], run: Settings, positions: int) -> Answers | None:
    if not files:
        return None
    from mediator_cli.cli.opening import quiet_transformers
    from mediator_cli.compare.answers import compare_answers
    from mediator_cli.evaluate.tasks import load_tasks
    from mediator_cli.pipeline.kinship import check_pair

    check_pair(plan)
    tasks = load_tasks(files)
    quiet_transformers()
    return compare_answers(plan, tasks, run, positions)


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
        print_table(("unit", "pcc#", "cosine#", "distance#", *_more_columns(report)), _unit_rows_of_two(report))
    else:
        if len(report.experts) <= _TABLE:
            print_table(["", *(f"{name}#" for name in report.order)], _pair_rows(report))
        else:
            print_table(("nearest kin", f"{report.metric}#", "strangers", f"{report.metric}#"), _extreme_rows(report))
        if report.metric != "output":
            print_table(("unit", "mean#", "lowest#", "of", "highest#", "of"), _unit_rows(report))
        say("family tree:")
        for line in _tree(report):
            say(line)
    if report.n_positions:
        say(f"answers compared at {report.n_positions} tokens")
    for line in proposal_words(report):
        say(line)


def _how(report: KinshipReport) -> str:
    forms = (
        ("from the adapters' factors", report.low_rank),
        ("rounded to 8 bits", report.int8),
        ("mean over tensors by size", report.split),
    )
    name = _NAMES[report.metric] + (" of the deltas" if report.metric in ("pcc", "cosine", "euclidean") else "")
    return ", ".join([name, *(word for word, is_on in forms if is_on and report.metric != "output")])


def _values(report: KinshipReport, pairs: Sequence[PairKinship]) -> dict[tuple[str, str], float | None]:
    """Give the metric of each pair, in both orders of its names."""
    found = {pair.experts: getattr(pair, report.metric) for pair in pairs}
    return {**found, **{(right, left): value for (left, right), value in found.items()}}


def _cell(report: KinshipReport, name: str, other: str) -> Text:
    from rich.text import Text

    value = None if name == other else _values(report, report.pairs)[name, other]
    if value is None:
        return Text("" if name == other else "–")
    if report.metric in _DISTANCES:
        return Text(_written(report, value))
    shade = next(colour for limit, colour in reversed(_SHADES) if value >= limit)
    return Text(_written(report, value), style=f"black on {shade}")


def _written(report: KinshipReport, value: float) -> str:
    return _distance(value) if report.metric in _DISTANCES else f"{value:.3f}"


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
        more = [getattr(pair, name.rstrip("#").replace("answers", "output")) for name in _more_columns(report)]
        yield (
            unit,
            *both,
            "–" if pair.euclidean is None else _distance(pair.euclidean),
            *("–" if value is None else f"{value:.3f}" for value in more),
        )


def _more_columns(report: KinshipReport) -> list[str]:
    """Name what was measured beside the three of all deltas."""
    return [*(["overlap#"] if report.low_rank else []), *(["answers#"] if report.n_positions else [])]


def _extreme_rows(report: KinshipReport) -> Iterator[tuple[str, ...]]:
    """List the nearest pairs and the strangest beside each other."""
    sign = -1 if report.metric in _DISTANCES else 1
    known = [(getattr(pair, report.metric), " + ".join(pair.experts)) for pair in report.pairs]
    ranked = sorted(((value, names) for value, names in known if value is not None), key=lambda pair: -sign * pair[0])
    for (value, names), (other, strangers) in zip(ranked[:_SHOWN], ranked[::-1][:_SHOWN], strict=True):
        yield names, _written(report, value), strangers, _written(report, other)


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


def _tree(report: KinshipReport) -> Iterator[str]:
    joins = [(branch.left, branch.right, branch.kinship) for branch in report.tree]
    return dendrogram(report.order, joins, _leaf(report), lambda value: _written(report, value))


def _leaf(report: KinshipReport) -> float:
    """Give the kinship of an expert with itself."""
    return 0.0 if report.metric in _DISTANCES else 1.0


def proposal_words(report: KinshipReport) -> Iterator[str]:
    """Say which experts to merge, and why."""
    if not report.groups:
        yield "nothing is proposed: no pair has a kinship"
        return
    is_distance = report.metric in _DISTANCES
    pair, most, what = (
        report.groups[0],
        "largest" if is_distance else "lowest",
        "distance" if is_distance else "kinship",
    )
    of_all = f", the {most} of all pairs" if len(report.pairs) > 1 else ""
    yield f"merge first: {' + '.join(pair.experts)}, {what} {_written(report, pair.kinship)}{of_all}"
    for group in report.groups[1:_SHOWN]:
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
    side = max(3.5, min(0.7, 17 / n) * n + 1.5)
    figure, (top, below) = plt.subplots(
        2, 1, figsize=(side + 1, 1.5 * side), height_ratios=(1, 2), sharex=True, layout="constrained"
    )
    for xs, ys in tree_lines(report):
        top.plot(xs, ys, color="#08306b")
    top.set_ylabel(_NAMES[report.metric])
    if report.metric not in _DISTANCES:
        top.invert_yaxis()
    limits = {} if report.metric in _DISTANCES else {"vmin": 0 if report.metric == "overlap" else -1, "vmax": 1}
    picture = below.imshow(numbers, aspect="auto", cmap="RdYlBu_r", **limits)
    below.set_xticks(range(n), report.order, rotation=45, ha="right")
    below.set_yticks(range(n), report.order)
    patch = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1.5}
    for y, row in enumerate(table):
        for x, value in enumerate(row):
            if value is not None and n <= 2 * _TABLE:
                below.text(x, y, _written(report, value), ha="center", va="center", fontsize=8, bbox=patch)
    figure.colorbar(picture, ax=below, label=_how(report), shrink=0.8)
    figure.suptitle("Kinship of the experts' deltas")
    figure.savefig(file, bbox_inches="tight", dpi=120)
    plt.close(figure)


def tree_lines(report: KinshipReport) -> Iterator[tuple[list[float], list[float]]]:
    """Give the lines of the dendrogram, one bracket for each branch; leaves begin at no distance from themselves."""
    tops: dict[tuple[str, ...], tuple[float, float]]
    tops = {(name,): (float(at), _leaf(report)) for at, name in enumerate(report.order)}
    for branch in report.tree:
        (left, low), (right, other) = tops[branch.left], tops[branch.right]
        yield [left, left, right, right], [low, branch.kinship, branch.kinship, other]
        tops[branch.left + branch.right] = ((left + right) / 2, branch.kinship)
