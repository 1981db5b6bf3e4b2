"""What strategies that fit something have in common: the rows that they look at, and the factor on a merged change."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from mediator_cli.errors import CheckpointError, Problem
from mediator_cli.strategies.library import scaled
from mediator_cli.strategies.strategy import Fitted

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from mediator_cli.evaluate.tasks import Row
    from mediator_cli.strategies.bench import Bench
    from mediator_cli.strategies.library import Change

GRID = (0.125, 0.18, 0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0)
"""The factors that may be tried, about a half octave apart."""

Scale = Annotated[
    float | None,
    Field(
        gt=0,
        allow_inf_nan=False,
        description="Multiplies the merged change; null: from 1 up or down in steps of about √2, between 1/8 and 4, as "
        "long as the validation loss falls.",
    ),
]
TuningRows = Annotated[int, Field(ge=1, description="Validation rows of each task that a try looks at, at most.")]


def names_of(bench: Bench) -> tuple[str, ...]:
    """Name the experts; raise CheckpointError where there is none to combine."""
    if not bench.library.experts:
        raise CheckpointError(Problem("experts", "there are none to combine", "name one at least"))
    return bench.library.names


def rows_to_fit(bench: Bench, most: int | None = None) -> dict[str, Sequence[Row]]:
    """Give the first validation rows of each task that may be looked at, by task, at most so many of each.

    Raises CheckpointError where no task has any.
    """
    found: dict[str, Sequence[Row]] = {task.name: task.valid[:most] for task in bench.seen if task.valid}
    if not found:
        hint = "give some rows of the experts' tasks, or set what is to be fitted by hand"
        raise CheckpointError(Problem("validation rows", "there are none to fit on", hint))
    return found


def fit_scale(
    bench: Bench, change: Change, scale: float | None, tuning_rows: int, facts: Mapping[str, Any], started: float
) -> Fitted:
    """Fold a merged change, multiplied by a factor that is given or found by the loss of validation rows.

    `facts` get the factor, those tried with their losses, and the seconds since `started`.
    """
    tried: dict[float, float] = {}
    if scale is None:
        rows = rows_to_fit(bench, tuning_rows)

        def loss(factor: float) -> float:
            bench.progress("try factors on the merged change", len(tried) + 1, len(GRID))
            return bench.loss(Fitted(folded=(scaled(change, factor),)), rows)

        tried = climb(GRID, loss)
        scale = min(tried, key=lambda factor: tried[factor])
    found = {
        **facts,
        "scale": scale,
        "scales_tried": [{"scale": factor, "loss": loss} for factor, loss in sorted(tried.items())],
        "rank": largest_rank(change),
        "seconds": perf_counter() - started,
    }
    return Fitted(folded=(scaled(change, scale),), facts=found)


def climb(grid: Sequence[float], loss: Callable[[float], float]) -> dict[float, float]:
    """Go from 1 along a grid in the direction in which a loss falls, until it no longer does; all values that it saw.

    Of a loss with one valley it finds the best of the whole grid.
    """
    at = grid.index(1.0)
    seen = {1.0: loss(1.0)}
    for step in (1, -1):
        place = at + step
        while 0 <= place < len(grid):
            seen[grid[place]] = loss(grid[place])
            if seen[grid[place]] >= seen[grid[place - step]]:
                break
            place += step
        if place != at + step:
            break
    return seen


def largest_rank(change: Change) -> int:
    """Give the largest rank of what is added to any matrix; 0 for no change."""
    return max((len(delta.a) for delta in change.values()), default=0)
