"""`mediator compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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


def _list_strategies(asked: bool) -> None:
    if asked:
        from mediator_cli.cli.contest import show_strategies

        show_strategies()
        raise typer.Exit


def compare(
    recipe: RecipeArgument,
    listing: Annotated[
        bool,
        typer.Option("--list", callback=_list_strategies, is_eager=True, help="List all strategies with parameters."),
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what earlier runs found, and measure anew.")] = False,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", metavar="FILE", help="Write the table here too.", show_default=False)
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="Draw accuracy against time and memory: FILE.html, .png, .svg."),
    ] = None,
    write_best: Annotated[
        Path | None,
        typer.Option("--write-best", metavar="DIR", help="Write the best on validation rows as a bundle."),
    ] = None,
    write: Annotated[
        tuple[str, Path] | None,
        typer.Option("--write", metavar="STRATEGY DIR", help="Write this strategy as a bundle.", show_default=False),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a bundle that stands there.")] = False,
    changes: SetOption = None,
    memory: MemoryOption = "2GiB",
    workers: WorkersOption = None,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Ask how to use a library of adapters: ensemble, merge or route? On the same rows; goes on where it stopped."""
    from mediator_cli.checkpoint.hub.collections import collection_lister
    from mediator_cli.checkpoint.hub.find import Access
    from mediator_cli.cli.contest import refuse_failed, show_report, show_written, shown_steps, write_report
    from mediator_cli.cli.heat.map import check_plot
    from mediator_cli.cli.opening import quiet_transformers
    from mediator_cli.cli.output import Told
    from mediator_cli.cli.run import settings
    from mediator_cli.compare.contest_job import Steps, prepare_contest, report_contest
    from mediator_cli.compare.strategies_run import forget
    from mediator_cli.compare.wanted import Wanted, check_wanted, write_wanted
    from mediator_cli.recipe.compare import load_compare

    check_plot(plot)
    access, told = Access(offline), Told(quiet)
    loaded = load_compare(recipe, changes or (), collection_lister(access))
    quiet_transformers()
    with shown_steps(quiet or as_json) as (progress, say):
        run = settings(memory, workers, progress=progress, notify=told.tell)
        contest, notices = prepare_contest(loaded, access, Steps(progress, say, run))
        told.tell(*notices)
        if fresh:
            forget(contest)
        wanted = Wanted(write_best, write, overwrite=overwrite)
        check_wanted(contest, wanted)
        report = report_contest(contest, loaded, notices)
        written = write_wanted(contest, loaded, report, wanted)
    write_report(report, loaded, markdown, plot)
    show_report(report, written, as_json=as_json)
    if not (as_json or quiet):
        show_written(written, [file for file in (markdown, plot) if file])
    refuse_failed(report, loaded)
