"""Prompts of an expert's task, from JSON lines."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from mediator_cli.errors import CheckpointError, Problem

if TYPE_CHECKING:
    from pathlib import Path

_FORM = 'a line is an object with a text `prompt`, as {"prompt": "How many are left?"}'
_SHOWN = 3


def read_prompts(file: Path) -> tuple[str, ...]:
    """Read the prompts of a file, one JSON object a line; other fields and blank lines are passed over.

    Raises CheckpointError with the first few problems, each with its line.
    """
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        message = f"cannot read: {(error.strerror or 'unreadable').lower()}"
        hint = "check the path" if isinstance(error, FileNotFoundError) else "check the path and its rights"
        raise CheckpointError(Problem(str(file), message, hint)) from None
    found = {number: _read_line(line) for number, line in enumerate(lines, 1) if line.strip()}
    faults = [Problem(f"{file}:{number}", fault, _FORM) for number, (_, fault) in found.items() if fault]
    if len(faults) > _SHOWN:
        rest = Problem(str(file), f"{len(faults) - _SHOWN} more lines are faulty", _FORM)
        raise CheckpointError([*faults[:_SHOWN], rest])
    if faults or not found:
        raise CheckpointError(faults or Problem(str(file), "holds no prompts", _FORM))
    return tuple(prompt for prompt, _ in found.values())


def _read_line(line: bytes) -> tuple[str, str]:
    """Give the prompt of a line, and what is wrong with it or an empty text."""
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError:
        return "", "is not UTF-8 text"
    except (ValueError, RecursionError) as error:
        return "", f"broken JSON: {error}"
    prompt = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(prompt, str):
        return "", "has no `prompt`" if prompt is None else "`prompt` is not a text"
    return prompt, "" if prompt.strip() else "`prompt` is empty"
