"""What `mediator compare` shows: while it works the strategy at hand and the time left for all, then its report."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mediator_cli.cli.output import console, print_json, print_table, say, shown_folder, write_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from mediator_cli.compare.contest_report import ContestReport
    from mediator_cli.recipe.compare import LoadedCompare

    Steps = tuple[Callable[[str, int, int], None], Callable[[str], None]]


@contextmanager
def shown_steps(quiet: bool) -> Iterator[Steps]:
    """Give a function for progress and one for lines: bars on a terminal, a line a strategy elsewhere."""
    if quiet:
        yield (lambda stage, done, total: None), (lambda text: None)
    elif not sys.stderr.isatty():
        yield (lambda stage, done, total: None), _print
    else:
        with _bars() as show:
            yield show, lambda text: None


def _print(text: str) -> None:
    console(stderr=True).print(text, markup=False)


@contextmanager
def _bars() -> Iterator[Callable[[str, int, int], None]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    known: dict[str, TaskID] = {}
    with Progress(*columns, console=console(stderr=True)) as bars:

        def show(stage: str, done: int, total: int) -> None:
            if stage not in known:
                known[stage] = bars.add_task(stage.replace("[", "\\["), total=total)
            bars.update(known[stage], completed=done, total=total)
            # Only what is at hand is shown, beside the strategies that are done.
            for other, task in known.items():
                bars.update(task, visible=other in (stage, "strategies"))

        yield show


def show_strategies() -> None:
    """List all strategies: group, what each does, and its parameters with their defaults."""
    from mediator_cli.strategies.registry import strategies

    order = ("reference", "ensemble", "merge", "route")
    rows = [
        (
            each.name,
            each.group,
            each.summary,
            ", ".join(f"{n}={f.default}" for n, f in each.schema.model_fields.items()),
        )
        for each in sorted(strategies().values(), key=lambda each: (order.index(each.group), each.name))
    ]
    print_table(("strategy", "group", "what it does", "parameters"), rows)


def write_report(report: ContestReport, loaded: LoadedCompare, markdown: Path | None, plot: Path | None) -> None:
    """Write the table and draw the charts where files are given."""
    from mediator_cli.cli.contest_page import contest_page
    from mediator_cli.cli.contest_picture import draw_contest
    from mediator_cli.compare.contest_table import markdown as markdown_of

    if markdown is not None:
        write_text(markdown, markdown_of(report))
    if plot is not None and plot.suffix == ".html":
        write_text(plot, contest_page(report, loaded.text))
    elif plot is not None:
        draw_contest(plot, report)


def show_report(report: ContestReport, written: Mapping[str, Path], *, as_json: bool) -> None:
    """Print a report as tables with notes, or as JSON with the folders of bundles that were written."""
    from mediator_cli.compare.contest_report import as_json as json_of
    from mediator_cli.compare.contest_table import cells, notes, selection_cells

    if as_json:
        print_json(json_of(report) | {"written": {name: str(folder) for name, folder in written.items()}})
        return
    print_table(*cells(report))
    if report.selection:
        print_table(*selection_cells(report))
    for line in notes(report):
        say(line)


def show_written(written: Mapping[str, Path], files: Sequence[Path]) -> None:
    """Tell what was written where, and what can be done with it."""
    for file in files:
        say(f"written to {file}")
    for name, folder in written.items():
        place = shown_folder(folder)
        say(f"{name} written to {place}")
        say(f'Next: mediator generate {place} "…"')


def refuse_failed(report: ContestReport, loaded: LoadedCompare) -> None:
    """Raise CheckpointError for strategies that the recipe names and that have no result; others were told of."""
    from mediator_cli.errors import CheckpointError, Problem

    labels = [spec.shown for spec in loaded.recipe.strategies]
    places = {label: loaded.place("strategies", at) for at, label in enumerate(labels)}
    hint = "the others are above, and are kept; leave it out, or give it what it needs"
    problems = [Problem(places[name], f"{name}: {reason}", hint) for name, reason in report.failed if name in places]
    if problems:
        raise CheckpointError(problems)
