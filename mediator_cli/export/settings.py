"""How an export runs, whatever it writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mediator_cli.pipeline.progress import Progress, silent, unheard

if TYPE_CHECKING:
    from collections.abc import Callable

    from mediator_cli.engine.publish import Mode


@dataclass(frozen=True)
class Run:
    """What may stand at the output, and who hears of progress and notices; `seed` is that of random sketches.

    `progress` hears of bytes, `rows` of answers to the user's rows.
    """

    overwrite: bool = False
    progress: Progress = silent
    rows: Progress = silent
    notify: Callable[[str], None] = unheard
    seed: int = 0

    @property
    def mode(self) -> Mode:
        """What may stand at the output."""
        return "overwrite" if self.overwrite else "new"
