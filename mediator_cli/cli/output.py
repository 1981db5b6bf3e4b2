"""All printing: tables, JSON, problems, sizes. Plain text when the output is not a terminal."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import Console
    from rich.text import Text

    from mediator_cli.errors import Problem

_STEP = 1000


def console(*, stderr: bool = False) -> Console:
    """Make a console that neither wraps nor colours what goes to a file or a pipe."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else 160
    return Console(stderr=stderr, highlight=False, emoji=False, soft_wrap=not stream.isatty(), width=width)


def say(text: str = "") -> None:
    """Print one line of plain text."""
    console().print(text, markup=False)


def print_json(data: Any) -> None:  # noqa: ANN401 - any JSON
    """Print data as JSON."""
    sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def print_problems(problems: Iterable[Problem]) -> None:
    """Print what is wrong and what to do about it, to stderr."""
    out = console(stderr=True)
    for problem in problems:
        place = f"{problem.place}: " if problem.place else ""
        out.print(f"[bold red]error:[/] {_plain(place)}{_plain(problem.message)}")
        if problem.hint:
            out.print(f"  hint: {_plain(problem.hint)}")


def problem_rows(problems: Iterable[Problem]) -> list[dict[str, str]]:
    """Give problems as JSON objects."""
    return [{"place": p.place, "message": p.message, "hint": p.hint} for p in problems]


def print_notices(notices: Iterable[str]) -> None:
    """Print things worth knowing that stop nothing, to stderr."""
    out = console(stderr=True)
    for notice in notices:
        out.print(f"[yellow]warning:[/] {_plain(notice)}")


def _plain(text: str) -> str:
    return text.replace("[", "\\[")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str | Text]], title: str = "") -> None:
    """Print a table; columns whose name ends with `#` hold numbers."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title or None, title_justify="left", pad_edge=False)
    for column in columns:
        is_number = column.endswith("#")
        justify: Literal["left", "right"] = "right" if is_number else "left"
        table.add_column(column.rstrip("#"), justify=justify, overflow="fold", no_wrap=is_number)
    for row in rows:
        table.add_row(*(_plain(cell) if isinstance(cell, str) else cell for cell in row))
    console().print(table)


def human_bytes(n: float) -> str:
    """Write a number of bytes for people.

    >>> human_bytes(269_000_000), human_bytes(12)
    ('269.0 MB', '12 B')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if n < _STEP:
            return f"{n:.0f} B" if unit == "B" else f"{n:.1f} {unit}"
        n /= _STEP
    return f"{n:.1f} TB"
