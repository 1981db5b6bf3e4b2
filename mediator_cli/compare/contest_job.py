"""From a recipe to a report: everything is checked before the model is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from mediator_cli.compare.contest_report import Conditions, report_of
from mediator_cli.compare.costs import timed_rows
from mediator_cli.compare.entries import find_entries
from mediator_cli.compare.rows import overlaps, read_tasks
from mediator_cli.compare.selection_run import run_selections, sizes_of
from mediator_cli.compare.sources import open_sources, plan_sources
from mediator_cli.compare.strategies_run import Contest, hold_contest
from mediator_cli.errors import CheckpointError, MediatorError
from mediator_cli.pipeline.record import package_version
from mediator_cli.pipeline.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from mediator_cli.checkpoint.hub.find import Access
    from mediator_cli.compare.contest_report import ContestReport
    from mediator_cli.compare.entries import Entry
    from mediator_cli.errors import Problem
    from mediator_cli.plan.model import Plan
    from mediator_cli.recipe.compare import LoadedCompare
    from mediator_cli.strategies.bench import TaskRows


@dataclass(frozen=True)
class Steps:
    """Where a contest says what happens: stages with their progress, lines, and notices."""

    progress: Callable[[str, int, int], None] = lambda stage, done, total: None
    say: Callable[[str], None] = lambda text: None
    settings: Settings = field(default_factory=Settings)


def prepare_contest(
    loaded: LoadedCompare, access: Access, steps: Steps | None = None
) -> tuple[Contest, tuple[str, ...]]:
    """Check recipe, rows, strategies and experts, and read the experts; give the contest and what is worth knowing.

    Raises MediatorError with all problems of rows, strategies and headers together, then with those of the factors.
    """
    steps = steps or Steps()
    problems: list[Problem] = []
    tasks: tuple[TaskRows, ...] = ()
    entries: tuple[Entry, ...] = ()
    said: tuple[str, ...] = ()
    plan: Plan | None = None
    try:
        tasks = read_tasks(loaded)
    except MediatorError as error:
        problems += error.problems
    try:
        entries, said = find_entries(loaded, tasks)
    except MediatorError as error:
        problems += error.problems
    try:
        sizes_of(loaded)
        plan = plan_sources(loaded, access)
    except MediatorError as error:
        problems += error.problems
    if problems or plan is None:
        raise CheckpointError(loaded.ordered(problems))
    sources = open_sources(loaded, plan, steps.settings)
    contest = Contest(
        sources, tasks, entries, loaded.folder, loaded.recipe.seed, package_version(),
        progress=steps.progress, say=steps.say,
    )  # fmt: skip
    return contest, (*sources.notices, *overlaps(tasks), *said)


def report_contest(contest: Contest, loaded: LoadedCompare, notices: tuple[str, ...] = ()) -> ContestReport:
    """Let all strategies answer, then all selections that the recipe asks for, and sum up."""
    outcomes, spec = list(hold_contest(contest)), loaded.recipe.selection
    selected = list(run_selections(contest, spec, sizes_of(loaded))) if spec is not None else []
    return report_of(outcomes, contest.tasks, conditions_of(contest), notices, selected)


def conditions_of(contest: Contest) -> Conditions:
    """Say under which conditions a contest was held."""
    plan = contest.sources.plan
    return Conditions(
        version=contest.version,
        base=plan.loaded.recipe.base,
        experts=tuple(contest.sources.factors),
        seen={task.name: len(task.test) for task in contest.tasks if not task.is_held_out},
        held_out={task.name: len(task.test) for task in contest.tasks if task.is_held_out},
        threads=torch.get_num_threads(),
        timed_rows=sum(len(rows) for rows in timed_rows(contest.tasks).values()),
        base_bytes=sum(info.n_bytes for info in plan.base.tensors.values()),
        seed=contest.seed,
    )
