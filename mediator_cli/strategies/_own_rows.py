"""The rows that belong to an expert: those of the tasks that it was trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from mediator_cli.errors import Problem, RecipeError

if TYPE_CHECKING:
    from mediator_cli.evaluate.tasks import Row
    from mediator_cli.strategies.bench import Bench, TaskRows

Source = Literal["valid", "train", "both"]
SourceParameter = Annotated[
    Source, Field(description="Which rows of a task its expert is known by; both: those to train on too, if given.")
]


def rows_by_expert(bench: Bench, source: Source = "valid") -> dict[str, list[Row]]:
    """Give each expert the rows of its tasks; raise RecipeError naming experts that have none."""
    found: dict[str, list[Row]] = {name: [] for name in bench.library.names}
    for task in bench.seen:
        if task.expert in found:
            found[task.expert] += _chosen(task, source)
    hint = "say which task it was trained on and give rows of it, or take a strategy that needs none"
    if problems := [
        Problem(name, f"has no {source} rows of its own", hint) for name, rows in found.items() if not rows
    ]:
        raise RecipeError(problems)
    return found


def _chosen(task: TaskRows, source: Source) -> tuple[Row, ...]:
    if source == "both":
        return (*task.train, *task.valid)
    return task.train if source == "train" else task.valid
