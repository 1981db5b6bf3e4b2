"""The rows of a comparison: read, cut to size, and checked against the experts."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mediator_cli.compare.store import row_key
from mediator_cli.errors import CheckpointError, Problem, did_you_mean
from mediator_cli.evaluate.tasks import load_tasks
from mediator_cli.strategies.bench import TaskRows

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mediator_cli.evaluate.tasks import Row
    from mediator_cli.recipe.compare import LoadedCompare

_PARTS = ("train", "valid", "test")


def read_tasks(loaded: LoadedCompare) -> tuple[TaskRows, ...]:
    """Read the rows of all tasks; those whose expert is not known are held out.

    Raises CheckpointError with all problems: files that are missing or damaged, unknown experts, nothing to fit on.
    """
    problems: list[Problem] = []
    experts = [each.name for each in loaded.recipe.experts]
    found = []
    for name, spec in loaded.recipe.tasks.items():
        parts = {part: _read(loaded, name, part, problems) for part in _PARTS}
        own = spec.expert if spec.expert is not None else name if name in experts else None
        if own is not None and own not in experts:
            place = loaded.place("tasks", name, "expert")
            problems.append(Problem(place, f"no expert '{own}'", did_you_mean(own, experts)))
        found.append(TaskRows(name, **parts, expert=own))
    if not problems and all(task.is_held_out for task in found):
        message = f"no task is named like an expert: {', '.join(task.name for task in found)}"
        hint = f"the experts are {', '.join(experts)}; say whose task it is: `expert: {experts[0]}`"
        problems.append(Problem(loaded.place("tasks"), message, hint))
    if problems:
        raise CheckpointError(problems)
    return tuple(found)


def _read(loaded: LoadedCompare, name: str, part: str, problems: list[Problem]) -> tuple[Row, ...]:
    written = getattr(loaded.recipe.tasks[name], part)
    if written is None:
        return ()
    try:
        (task,) = load_tasks([loaded.resolve(written)])
    except CheckpointError as error:
        place = loaded.place("tasks", name, part)
        problems += [replace(each, place=f"{place}: {each.place}") for each in error.problems]
        return ()
    return task.rows[: getattr(loaded.recipe.rows, part)]


def overlaps(tasks: Sequence[TaskRows]) -> Iterator[str]:
    """Tell of rows that are fitted on and tested on: scores on them say less."""
    for task in tasks:
        tested = {row_key(row) for row in task.test}
        for part, rows in (("train", task.train), ("valid", task.valid)):
            if shared := len(tested & {row_key(row) for row in rows}):
                yield f"{shared} of {len(task.test)} test rows of {task.name} are among its {part} rows too"
