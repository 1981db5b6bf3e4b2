"""`mediator analyze-conflicts`."""

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
from mediator_cli.cli.output import Told, print_json, say
from mediator_cli.errors import OutputError, Problem


def analyze_conflicts(
    recipe: RecipeArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the report goes.")] = Path("conflicts.json"),
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Also draw the heat map: FILE.html, or .png, .svg, .pdf.")
    ] = None,
    sample: Annotated[
        float | None,
        typer.Option(
            "--sample",
            metavar="SHARE",
            help="Read this share of the weights alone, such as 0.05: an estimate with bounds.",
        ),
    ] = None,
    changes: SetOption = None,
    memory: MemoryOption = "2GiB",
    workers: WorkersOption = None,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure where the experts disagree: a heat map of layers by module kinds, and a report to reuse."""
    from mediator_cli.checkpoint.hub.collections import collection_lister
    from mediator_cli.checkpoint.hub.find import Access
    from mediator_cli.cli.heat.map import check_plot, draw, print_heat_map, write_report
    from mediator_cli.cli.progress import shown_progress
    from mediator_cli.cli.run import settings
    from mediator_cli.pipeline.conflicts import preview_assignment
    from mediator_cli.pipeline.routable import check_routing
    from mediator_cli.pipeline.survey import analyze_conflicts as measure
    from mediator_cli.pipeline.survey import sample_conflicts
    from mediator_cli.plan.make import make_plan
    from mediator_cli.recipe.load import load_partly

    if sample is not None and not 0 < sample < 1:
        message = f"{sample:g} is no share between 0 and 1"
        raise OutputError(Problem("--sample", message, "give for example --sample 0.05"))
    access = Access(offline)
    made = check_routing(make_plan(load_partly(recipe, changes or (), collection_lister(access)), access))
    check_plot(plot)
    told = Told(quiet)
    told.tell(*made.notices)
    with shown_progress(quiet) as progress:
        run = settings(memory, workers, progress=progress, notify=told.tell)
        report = measure(made, run) if sample is None else sample_conflicts(made, sample, run)
    write_report(output, report)
    preview = preview_assignment(made, report)
    if plot is not None:
        draw(plot, made, report, preview)
    if as_json:
        print_json(report.model_dump(mode="json"))
    elif not quiet:
        print_heat_map(report, preview)
        say(f"report written to {output}" + (f", picture to {plot}" if plot else ""))
        if sample is None:
            say(f"Next: mediator merge {recipe} --conflicts {output}")
        else:
            say(f"Next: mediator analyze-conflicts {recipe}   ·   a merge needs the exact scores")
