"""From outcomes to one report: every variant a row, the reference first, differences against it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mediator_cli.evaluate.report import ModelResult, Report, compare, mean_over_tasks, task_result

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mediator_cli.compare.run import Outcome


def report_of(outcomes: Sequence[Outcome], reference: str, seed: int = 0) -> Report:
    """Sum outcomes up; differences, by paired bootstrap over rows, are against the variant named `reference`."""
    ordered = sorted(outcomes, key=lambda outcome: outcome.variant.name != reference)
    results = tuple(_result(outcome) for outcome in ordered)
    exact = {
        outcome.variant.name: {task: [score.exact for score in scores] for task, scores in outcome.scores.items()}
        for outcome in ordered
    }
    return Report(results, compare(exact, seed))


def _result(outcome: Outcome) -> ModelResult:
    tasks = tuple(task_result(task, scores) for task, scores in outcome.scores.items())
    mean, error = mean_over_tasks(tasks)
    return ModelResult(outcome.variant.name, tasks, mean, error, outcome.n_bytes, None, outcome.seconds)
