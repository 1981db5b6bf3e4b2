"""`mediator ablate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mediator_cli.cli.evaluate import show_report, sorted_out, write_markdown
from mediator_cli.cli.mixtures import CombineOption, combination
from mediator_cli.cli.options import JsonOption, MemoryOption, QuietOption, RecipeArgument, SetOption, WorkersOption
from mediator_cli.cli.output import console, print_notices

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mediator_cli.evaluate.tasks import Task
    from mediator_cli.plan.model import Plan


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
    combine: CombineOption = None,
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
    from mediator_cli.cli.opening import quiet_transformers
    from mediator_cli.cli.run import settings
    from mediator_cli.compare.ablate import GROUPS, REFERENCE, conflict_scores, controls, prepare
    from mediator_cli.compare.run import Comparison, compare
    from mediator_cli.compare.table import report_of
    from mediator_cli.errors import MediatorError, Problem, did_you_mean
    from mediator_cli.evaluate.tasks import Task, load_tasks

    surplus, files = sorted_out(more or [], rows)
    problems = [Problem("--group", f"no group '{g}'", did_you_mean(g, GROUPS)) for g in groups or () if g not in GROUPS]
    problems += [Problem(word, "is no file of rows", "give JSON lines: --tasks FILE…") for word in surplus]
    if problems:
        raise MediatorError(problems)
    tasks = tuple(Task(task.name, task.rows[:limit]) for task in load_tasks(files))

    quiet_transformers()

    def report_step(text: str) -> None:
        if not quiet:
            console(stderr=True).print(text, markup=False)

    folder = work or Path(f"ablation-{recipe.stem}")
    how = combination(combine)
    job = Comparison(recipe, tasks, folder, tuple(changes or ()), None, settings(memory, workers), report_step, how)
    job, plan = prepare(job)
    print_notices(() if quiet else _left_out(plan, tasks))
    variants = controls(plan, conflict_scores(job, plan), draws, tuple(groups or GROUPS))
    report = report_of(list(compare(job, variants)), REFERENCE)
    show_report(report, as_json)
    write_markdown(report, markdown)


def _left_out(plan: Plan, tasks: tuple[Task, ...]) -> Iterator[str]:
    """Say what is not measured."""
    if plan.router is None:
        yield "the recipe fits no router: variants that need one are left out"
    known = [task.name for task in tasks]
    missing = [expert.name for expert in plan.experts if expert.name not in known]
    if missing:
        yield f"no rows are given for {', '.join(missing)}: means are over the other tasks"
