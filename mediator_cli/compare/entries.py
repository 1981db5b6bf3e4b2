"""Who takes part in a contest: strategies by name with checked parameters, and what they need of the rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from mediator_cli.errors import MediatorError, Problem, RecipeError, did_you_mean, some_names
from mediator_cli.strategies.registry import get_strategy, strategies

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mediator_cli.recipe.compare import LoadedCompare, StrategySpec
    from mediator_cli.strategies.bench import TaskRows
    from mediator_cli.strategies.strategy import Strategy


@dataclass(frozen=True)
class Entry:
    """One strategy that takes part: what it is called in the table, and all its parameters, defaults included."""

    label: str
    strategy: Strategy
    parameters: Mapping[str, Any]


def find_entries(loaded: LoadedCompare, tasks: Sequence[TaskRows]) -> tuple[tuple[Entry, ...], tuple[str, ...]]:
    """List those that take part, in the recipe's order, and what is to be said of them.

    Without a list all take part that can with these rows, and the others are told. Raises RecipeError with all
    problems: unknown strategies and parameters, values out of bounds, and listed ones that lack rows.
    """
    if not loaded.recipe.strategies:
        every = [Entry(name, each, each.schema().model_dump()) for name, each in strategies().items()]
        lacking = {entry.label: list(_lacks(entry.strategy, loaded, tasks)) for entry in every}
        told = tuple(f"{name} is left out: {what}" for name, each in lacking.items() for what in each[:1])
        return tuple(entry for entry in every if not lacking[entry.label]), told
    entries: list[Entry] = []
    problems: list[Problem] = []
    for index, spec in enumerate(loaded.recipe.strategies):
        try:
            entry = _entry(loaded, index, spec)
        except MediatorError as error:
            problems += error.problems
            continue
        place, hint = loaded.place("strategies", index), "add such rows, or leave the strategy out"
        problems += [Problem(place, f"{spec.name}: {what}", hint) for what in _lacks(entry.strategy, loaded, tasks)]
        entries.append(entry)
    if problems:
        raise RecipeError(problems)
    return tuple(entries), ()


def _entry(loaded: LoadedCompare, index: int, spec: StrategySpec) -> Entry:
    chosen = get_strategy(spec.name, loaded.place("strategies", index))
    try:
        checked = chosen.schema.model_validate(spec.parameters)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        raise RecipeError([_fault(loaded, index, chosen, item) for item in faults]) from None
    return Entry(spec.shown, chosen, checked.model_dump())


def _fault(loaded: LoadedCompare, index: int, chosen: Strategy, item: Any) -> Problem:  # noqa: ANN401 - pydantic's dict
    name = str(item["loc"][0]) if item["loc"] else ""
    place, known = loaded.place("strategies", index, name), list(chosen.schema.model_fields)
    if item["type"] == "extra_forbidden":
        hint = did_you_mean(name, known) if known else "it has no parameters"
        return Problem(place, f"{chosen.name} has no parameter '{name}'", hint)
    about = chosen.schema.model_fields[name].description if name in known else ""
    message = item["msg"].removeprefix("Value error, ")
    return Problem(place, f"{message[0].lower()}{message[1:]} (got {item['input']!r})", about or "")


def _lacks(chosen: Strategy, loaded: LoadedCompare, tasks: Sequence[TaskRows]) -> Iterator[str]:
    """Say what a strategy needs and the recipe does not give."""
    seen = [task for task in tasks if not task.is_held_out]
    if "rows" in chosen.needs and (without := [task.name for task in seen if not task.valid]):
        yield f"it is fitted on validation rows, and there are none for {some_names(without)}"
    if "tasks" in chosen.needs:
        known = {task.expert for task in seen}
        if alone := [each.name for each in loaded.recipe.experts if each.name not in known]:
            yield f"it asks which task an expert is of, and that is not known for {some_names(alone)}"
