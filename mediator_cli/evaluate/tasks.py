"""Tasks to evaluate on: JSON lines of prompt and answer. No torch here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from mediator_cli.checkpoint.header import unreadable
from mediator_cli.errors import CheckpointError, Problem, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

_FORM = 'a row is {"prompt": "…", "answer": "…"}, with "choices": ["…", "…"] where the answer is one of several'


class Row(BaseModel):
    """A prompt and the answer expected; `choices` hold the answer where it is one of several."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    prompt: str
    answer: str
    choices: list[str] | None = None
    id: str | int | None = None


@dataclass(frozen=True)
class Task:
    """Rows of one kind and the name that results are reported under."""

    name: str
    rows: tuple[Row, ...]


def load_tasks(files: Sequence[Path]) -> tuple[Task, ...]:
    """Read one task from each file; its name is the file's name up to the first dot: maths.test.jsonl is maths.

    Raises CheckpointError with all problems of all files, each with file and line.
    """
    problems: list[Problem] = []
    tasks: dict[str, Task] = {}
    for file in files:
        name = file.name.split(".")[0]
        if name in tasks:
            hint = "the name is the file's name up to the first dot; evaluate the two apart, or rename one"
            problems.append(Problem(str(file), f"a second task '{name}'", hint))
        tasks[name] = Task(name, tuple(_read(file, problems)))
    if problems:
        raise CheckpointError(problems)
    return tuple(tasks.values())


def _read(file: Path, problems: list[Problem]) -> Iterator[Row]:
    """Give the rows of one file and add what is wrong with it to `problems`."""
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        problems.extend(unreadable(file, error).problems)
        return
    if not any(line.strip() for line in lines):
        problems.append(Problem(str(file), "holds no rows", _FORM))
    for number, line in enumerate(lines, 1):
        if line.strip():
            faults = list(_faults(line))
            problems += [Problem(f"{file}:{number}{field}", message, hint) for field, message, hint in faults]
            if not faults:
                yield Row.model_validate_json(line)


def _faults(line: bytes) -> Iterator[tuple[str, str, str]]:
    """Give field, message and hint of all that is wrong with one line."""
    try:
        data = json.loads(line.decode())
    except UnicodeDecodeError:
        yield "", "is not UTF-8 text", "save the file as UTF-8"
        return
    except (ValueError, RecursionError) as error:
        yield "", f"broken JSON: {error}", _FORM
        return
    try:
        yield from _misfits(Row.model_validate(data))
    except ValidationError as error:
        yield from map(_fault, error.errors(include_url=False))


def _fault(error: Any) -> tuple[str, str, str]:  # noqa: ANN401 - pydantic's ErrorDetails
    field = "".join(f" {part}" for part in error["loc"][:1])
    if error["type"] == "extra_forbidden":
        return field, "no such field", did_you_mean(str(error["loc"][0]), Row.model_fields)
    return field, error["msg"][0].lower() + error["msg"][1:], _FORM


def _misfits(row: Row) -> Iterator[tuple[str, str, str]]:
    if not row.prompt.strip():
        yield " prompt", "is empty", _FORM
    if not row.answer.strip():
        yield " answer", "is empty", _FORM
    if row.choices is None:
        return
    if len(set(row.choices)) < 2 or len(set(row.choices)) < len(row.choices):
        yield " choices", "needs two or more different texts", _FORM
    if not all(choice.strip() for choice in row.choices):
        yield " choices", "holds an empty text", _FORM
    if row.answer not in row.choices:
        yield " choices", f"lacks the answer {row.answer!r}", _FORM
