"""How far a stage is: a function that the command line turns into a bar and a library user may ignore."""

from __future__ import annotations

import threading
from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with the stage's name, bytes done and bytes in all; from one thread at a time."""


def silent(stage: str, done: int, total: int) -> None:
    """Report nothing."""


def unheard(notice: str) -> None:
    """Tell nobody; the manifest holds all notices."""


def counter(progress: Progress, stage: str, total: int, per_item: int = 1) -> Callable[[int], None]:
    """Return an `advance(n)` that reports the running total of n · per_item bytes; safe to call from any thread."""
    lock = threading.Lock()
    done = 0

    def advance(n: int) -> None:
        nonlocal done
        with lock:
            done = min(total, done + n * per_item)
            progress(stage, done, total)

    progress(stage, 0, total)
    return advance
