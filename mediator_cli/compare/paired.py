"""Means over tasks and paired differences between strategies, on the rows that both answered. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mediator_cli.evaluate.report import Difference, compare, mean_over_tasks, task_result

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mediator_cli.compare.contest import Scores


@dataclass(frozen=True)
class Mean:
    """Share of rows answered exactly, averaged over tasks with its standard error, and the mean -ln p of an answer."""

    accuracy: float
    standard_error: float | None
    loss: float
    n_tasks: int


def mean_of(scores: Scores, tasks: Iterable[str]) -> Mean | None:
    """Average over tasks, each alike; None unless all of them were answered."""
    wanted = list(tasks)
    if not wanted or any(task not in scores for task in wanted):
        return None
    results = [task_result(task, scores[task]) for task in wanted]
    accuracy, error = mean_over_tasks(results)
    return Mean(accuracy, error, -sum(result.log_prob for result in results) / len(results), len(results))


def difference_of(one: Scores, other: Scores, tasks: Iterable[str], seed: int = 0, name: str = "") -> Difference:
    """Give by how much `one` is exact more often than `other`, over the tasks' mean, with a 95 % interval.

    Paired bootstrap over the rows of each task; `name` is that of `one`.
    """
    wanted = list(tasks)
    exact = {
        which: {task: [score.exact for score in scores[task]] for task in wanted}
        for which, scores in (("", other), (name or "one", one))
    }
    found = compare(exact, seed)
    whole = next(each for each in found if each.task is None or len(wanted) == 1)
    return Difference(name, None, whole.difference, whole.low, whole.high)


def is_level(difference: Difference) -> bool:
    """Whether an interval holds zero: the rows do not tell the two apart."""
    return difference.low <= 0 <= difference.high
