"""All printing: tables, JSON, problems, sizes. Plain text when the output is not a terminal."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mediator_cli.errors import OutputError, Problem

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import Console
    from rich.text import Text


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


@dataclass
class Told:
    """Prints each notice once; when quiet, none."""

    quiet: bool
    seen: set[str] = field(default_factory=set)

    def tell(self, *notices: str) -> None:
        """Print the notices that were not printed yet."""
        new = [notice for notice in notices if notice not in self.seen]
        self.seen.update(new)
        print_notices(() if self.quiet else new)


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


def shown_folder(folder: Path) -> str:
    """Write a folder as a person would type it here."""
    whole = folder.resolve()
    text = str(whole.relative_to(Path.cwd())) if whole.is_relative_to(Path.cwd()) else str(whole)
    return f"'{text}'" if " " in text else text


def write_text(file: Path, text: str) -> None:
    """Write a text beside its place, then rename it; raise OutputError, and leave nothing, when that fails."""
    partial = file.with_name(f".{file.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.rename(file)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        reason = (error.strerror or "failed").lower()
        raise OutputError(Problem(str(file), f"cannot write: {reason}", "choose another place with -o")) from None
