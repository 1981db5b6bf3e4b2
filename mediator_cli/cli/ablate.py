"""`mediator ablate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mediator_cli.cli.evaluate import sorted_out
from mediator_cli.cli.options import JsonOption, MemoryOption, QuietOption, RecipeArgument, SetOption, WorkersOption
from mediator_cli.cli.output import console, print_json, print_table, say


def ablate(
    recipe: RecipeArgument,
    rows: Annotated[
        list[Path], typer.Option("--tasks", metavar="FILE…", help="JSON lines of one task each, named like its expert.")
    ],
    more: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    groups: Annotated[
        list[str] | None, typer.Option("--group", help="Only these controls; repeatable.", show_default="all")
    ] = None,
    draws: Annotated[int, typer.Option("--draws", min=1, help="Random choices of layers.")] = 5,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="First rows of each task.", show_default=False)
    ] = None,
    work: Annotated[
        Path | None, typer.Option("--work", help="Folder for scores and bundles; default: ablation-RECIPE.")
    ] = None,
    changes: SetOption = None,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", metavar="FILE", help="Write the table here too.", show_default=False)
    ] = None,
    memory: MemoryOption = "2GiB",
    workers: WorkersOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Ask whether routing pays: change one choice of a recipe at a time and measure each. Goes on where it stopped."""
    from mediator_cli.cli.run import settings
    from mediator_cli.compare.ablate import GROUPS, REFERENCE, conflict_scores, controls, prepare
    from mediator_cli.errors import MediatorError, Problem, did_you_mean
    from mediator_cli.evaluate.report import as_json as json_of
    from mediator_cli.evaluate.report import cells, notes
    from mediator_cli.evaluate.report import markdown as markdown_of
    from mediator_cli.evaluate.tasks import Task, load_tasks

    unknown = [Problem("--group", f"no group '{g}'", did_you_mean(g, GROUPS)) for g in groups or () if g not in GROUPS]
    if unknown:
        raise MediatorError(unknown)
    _, files = sorted_out(more or [], rows)
    tasks = tuple(Task(task.name, task.rows[:limit]) for task in load_tasks(files))
    from mediator_cli.cli.opening import quiet_transformers
    from mediator_cli.compare.run import Comparison, compare
    from mediator_cli.compare.table import report_of

    quiet_transformers()

    def report_step(text: str) -> None:
        if not quiet:
            console(stderr=True).print(text, markup=False)

    folder = work or Path(f"ablation-{recipe.stem}")
    job = Comparison(recipe, tasks, folder, tuple(changes or ()), None, settings(memory, workers), report_step)
    job, plan = prepare(job)
    variants = controls(plan, conflict_scores(job, plan), draws, tuple(groups or GROUPS))
    report = report_of(list(compare(job, variants)), REFERENCE)
    if markdown is not None:
        markdown.write_text(markdown_of(report), encoding="utf-8")
    if as_json:
        print_json(json_of(report))
        return
    print_table(*cells(report))
    for line in notes(report):
        say(line)
