"""The processes that carry out one merge together, as the engine sees them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import NDArray

if TYPE_CHECKING:
    from pathlib import Path

    from mediator_cli.engine.journal import Journal
    from mediator_cli.engine.streams import Piece

Arrays = Sequence[NDArray[Any]]


class Team(Protocol):
    """The processes that carry out one merge together.

    `meet`, then `gather` begin it and `leave` ends it; in between all call `share` equally often.
    """

    @property
    def member(self) -> int:
        """The number of this process, from 0."""
        ...

    @property
    def is_first(self) -> bool:
        """Whether this process writes what there is but one of."""
        ...

    def meet(self, board: Path) -> None:
        """Come to a shared folder; all but the first wait until the first has a journal there for them."""
        ...

    def gather(self) -> None:
        """Tell that this process has read the journal, and wait until all have."""
        ...

    def leave(self, error: BaseException | None) -> None:
        """Tell the others how this process ended; the first waits until they have ended too."""
        ...

    def mine(self, parts: Sequence[Piece]) -> Sequence[Piece]:
        """Choose the pieces that this process looks at; all of a tensor, or none."""
        ...

    def share(self, arrays: list[Arrays]) -> list[Arrays]:
        """Add up the arrays of all processes."""
        ...

    def has_shard(self, number: int, count: int) -> bool:
        """Whether this process writes the shard of a number, of so many."""
        ...

    def wait_for(self, journal: Journal, steps: Sequence[str]) -> None:
        """Wait until all steps are in the journals of all processes, and read those."""
        ...


@dataclass(frozen=True)
class Alone:
    """The only process."""

    @property
    def member(self) -> int:
        """Give 0."""
        return 0

    @property
    def is_first(self) -> bool:
        """Say yes."""
        return True

    def meet(self, board: Path) -> None:
        """Throw away what a team left here: there is nobody to meet."""
        shutil.rmtree(board, ignore_errors=True)

    def gather(self) -> None:
        """Return at once."""

    def leave(self, error: BaseException | None) -> None:
        """Return at once."""

    def mine(self, parts: Sequence[Piece]) -> Sequence[Piece]:
        """Choose all pieces."""
        return parts

    def share(self, arrays: list[Arrays]) -> list[Arrays]:
        """Give the arrays back."""
        return arrays

    def has_shard(self, number: int, count: int) -> bool:
        """Say yes."""
        return True

    def wait_for(self, journal: Journal, steps: Sequence[str]) -> None:
        """Return at once: this process has done them."""
