"""Tasks named together: a folder of rows in the place of a mapping."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from mediator_cli.errors import Problem, did_you_mean, some_names
from mediator_cli.recipe.strict import Strict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from mediator_cli.recipe.text import FieldPath

_ENDING = ".{}.jsonl"
_PARTS = ("train", "valid", "test")
_FORM = "write `tasks: {from: ./data}`, or a mapping of names"


class TasksFrom(Strict):
    """All tasks of a folder, sorted by name."""

    source: Annotated[
        str,
        Field(
            alias="from",
            min_length=1,
            description="A folder in which every TASK.test.jsonl is a task, with TASK.valid.jsonl and TASK.train.jsonl "
            "where there are such.",
        ),
    ]


@dataclass(frozen=True)
class ExpandedTasks:
    """Tasks as if each had been written by itself; `written` says where their fields stand in the file."""

    tasks: Any
    written: Mapping[FieldPath, FieldPath] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()


def expand_tasks(raw: Any, folder: Path, place: Callable[..., str]) -> ExpandedTasks:  # noqa: ANN401 - YAML data
    """Put every task of a `from` in its place in the mapping `tasks` of a recipe in `folder`.

    `place` says where a field stands.
    """
    if not (isinstance(raw, dict) and "from" in raw):
        return ExpandedTasks(raw)
    if problems := tuple(_faults(raw, folder, place)):
        return ExpandedTasks({}, problems=problems)
    source = str(raw["from"]).rstrip("/")
    found = {name: _files(source, name, parts) for name, parts in sorted(_found(folder / source).items())}
    written: dict[FieldPath, FieldPath] = {}
    for name, files in found.items():
        written |= {at: ("tasks", "from") for at in [("tasks", name), *(("tasks", name, part) for part in files)]}
    return ExpandedTasks(found, written)


def _faults(raw: Mapping[Any, Any], folder: Path, place: Callable[..., str]) -> Iterator[Problem]:
    for key in raw:
        if key != "from":
            yield Problem(place("tasks", str(key)), f"unknown key '{key}'", did_you_mean(str(key), ["from"]))
    where, source = place("tasks", "from"), raw["from"]
    if not isinstance(source, str) or not source:
        yield Problem(where, "should be a text", _FORM)
        return
    path = (folder / source).absolute()
    try:
        found = _found(path)
    except OSError as error:
        message = "no such folder" if not path.exists() else f"cannot be read: {(error.strerror or 'error').lower()}"
        yield Problem(f"{where}: {path}", message, "relative paths start at the recipe's folder")
        return
    if not any("test" in parts for parts in found.values()):
        yield Problem(f"{where}: {path}", "holds no rows to test on", "name files TASK.test.jsonl, TASK.valid.jsonl")
    elif lacking := sorted(name for name, parts in found.items() if "test" not in parts):
        message = f"no test rows for {some_names(lacking)}"
        yield Problem(f"{where}: {path}", message, f"add {lacking[0]}.test.jsonl, or take its other files away")


def _found(path: Path) -> dict[str, set[str]]:
    """List the tasks of a folder and which files each has; raise OSError where it cannot be read."""
    found: dict[str, set[str]] = {}
    for file in path.iterdir():
        for part in _PARTS:
            name = file.name.removesuffix(_ENDING.format(part))
            if name not in (file.name, "") and not name.startswith("."):
                found.setdefault(name, set()).add(part)
    return found


def _files(source: str, name: str, parts: set[str]) -> dict[str, str]:
    return {part: f"{source}/{name}{_ENDING.format(part)}" for part in _PARTS if part in parts}
