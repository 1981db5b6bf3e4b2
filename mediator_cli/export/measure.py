"""How well an exported expert answers the user's rows, against the bundle's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mediator_cli.errors import BundleError, Problem
from mediator_cli.evaluate.models import ORACLE, Candidate
from mediator_cli.evaluate.run import EvaluateSettings, evaluate
from mediator_cli.evaluate.score import ScoreSettings
from mediator_cli.export.report import Measured

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from mediator_cli.bundle.read import Bundle
    from mediator_cli.evaluate.report import TaskResult
    from mediator_cli.evaluate.tasks import Task
    from mediator_cli.export.settings import Run

_RULE = "a task is named by its file up to the first dot, and is answered by the expert of that name"


def check_tasks(tasks: Sequence[Task], experts: Sequence[str]) -> None:
    """Raise BundleError where a task is named like no expert that is exported."""
    problems = [
        Problem(f"--tasks {task.name}", "no exported expert has this name", f"{_RULE}: {', '.join(experts)}")
        for task in tasks
        if task.name not in experts
    ]
    if problems:
        raise BundleError(problems)


def measure(
    bundle: Bundle, adapters: Mapping[str, Path], tasks: Sequence[Task], run: Run, limit: int | None = None
) -> dict[str, Measured]:
    """Let the bundle's expert and dense + adapter answer each task; one model is in memory at a time."""
    if not tasks:
        return {}
    settings = EvaluateSettings(limit, ScoreSettings(), run.rows)
    whole = Candidate(f"{bundle.path.name}::{ORACLE}", bundle.path, "bundle", ORACLE)
    ours = {result.task: result for result in evaluate([whole], tasks, settings).models[0].tasks}
    found = {}
    for task in tasks:
        own = Candidate(f"dense + {task.name}", adapters[task.name], "adapter", base=bundle.path)
        theirs = evaluate([own], [task], settings).models[0].tasks[0]
        found[task.name] = _measured(ours[task.name], theirs)
    return found


def _measured(ours: TaskResult, theirs: TaskResult) -> Measured:
    return Measured(
        task=ours.task,
        rows=ours.n,
        bundle_accuracy=ours.accuracy,
        export_accuracy=theirs.accuracy,
        bundle_loss=round(-ours.log_prob, 6),
        export_loss=round(-theirs.log_prob, 6),
    )
