"""Progress of long stages: bars with bytes and time left on a terminal, one line a stage elsewhere."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mediator_cli.recipe.sizes import human_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Progress = Callable[[str, int, int], None]


@contextmanager
def shown_progress(quiet: bool) -> Iterator[Progress]:
    """Give a progress function for the pipeline."""
    if quiet:
        yield lambda stage, done, total: None
    elif sys.stderr.isatty():
        with _bars() as progress:
            yield progress
    else:
        yield _lines()


@contextmanager
def _bars() -> Iterator[Progress]:
    from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    from mediator_cli.cli.output import console

    columns = (TextColumn("{task.description:<16}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    tasks: dict[str, TaskID] = {}
    with RichProgress(*columns, TimeElapsedColumn(), console=console(stderr=True)) as bars:

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done)

        yield show


def _lines() -> Progress:
    started: dict[str, float] = {}

    def show(stage: str, done: int, total: int) -> None:
        if stage not in started:
            started[stage] = time.monotonic()
        if done >= total and started[stage] >= 0:
            sys.stderr.write(f"{stage}: {human_bytes(total)} in {time.monotonic() - started[stage]:.1f} s\n")
            started[stage] = -1.0

    return show
