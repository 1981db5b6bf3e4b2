"""Passes over slabs, and searches that need several of them and share each pass with others.

A search is a generator: it yields the sweeps that it needs next and gets, for each, the arrays that the sweep
gathered. Those that run together share what they read: each slab is read once for all.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from mediator_cli.engine.matrices import naming
from mediator_cli.engine.pool import run_all
from mediator_cli.engine.streams import Inputs, Piece
from mediator_cli.engine.team import Alone, Arrays, Team

if TYPE_CHECKING:
    from collections.abc import Mapping

T = TypeVar("T")
Source = Callable[[Piece], Inputs]
"""Reads one slab; equal sources are read once for all sweeps that look at them."""


@dataclass(frozen=True)
class Sweep:
    """One pass over `parts` of a source; `look` gathers, from any thread and in any order; `totals` gives the result.

    The arrays of several machines, each of which looked at some of the tensors, add up to that of all.
    A `quick` one reads but a sample.
    """

    source: Source
    parts: Sequence[Piece]
    look: Callable[[Piece, Inputs], None]
    totals: Callable[[], Arrays]
    quick: bool = False


Search = Generator[list[Sweep], list[Arrays], T]


def carry_out(search: Search[T], workers: int, advance: Callable[[int], None], team: Team | None = None) -> T:
    """Run a search to its end; `advance` is told of the elements read of each source."""
    try:
        sweeps = next(search)
        while True:
            run_sweeps(sweeps, workers, advance, team or Alone())
            # No name for what was gathered: it would stay in memory during the sweeps that follow.
            sweeps = search.send((team or Alone()).share([sweep.totals() for sweep in sweeps]))
    except StopIteration as end:
        result: T = end.value
        return result


def run_sweeps(sweeps: Sequence[Sweep], workers: int, advance: Callable[[int], None], team: Team) -> None:
    """Read each slab once and let all sweeps that asked for it look."""
    looks: dict[tuple[Source, Piece], list[Callable[[Piece, Inputs], None]]] = {}
    for sweep in sweeps:
        for piece in team.mine(sweep.parts):
            looks.setdefault((sweep.source, piece), []).append(sweep.look)
    items = list(looks.items())

    def work(item: tuple[tuple[Source, Piece], list[Callable[[Piece, Inputs], None]]]) -> None:
        (source, piece), each = item
        inputs = source(piece)
        with naming(piece.tensor):
            for look in each:
                look(piece, inputs)

    mean = sum(piece.size for _, piece in looks) / max(1, len(items))
    run_all(work, items, workers, lambda n: advance(round(n * mean)))


def all_of(searches: Sequence[Search[T]]) -> Search[list[T]]:
    """Run searches side by side; samples come first, so that the long passes behind them are shared."""
    results: dict[int, T] = {}
    wanted: dict[int, list[Sweep]] = {}

    def step(at: int, found: list[Arrays] | None) -> None:
        try:
            wanted[at] = next(searches[at]) if found is None else searches[at].send(found)
        except StopIteration as end:
            results[at] = end.value

    for at in range(len(searches)):
        step(at, None)
    while wanted:
        quick = {at: sweeps for at, sweeps in wanted.items() if all(sweep.quick for sweep in sweeps)}
        chosen = quick or dict(wanted)
        found = yield [sweep for sweeps in chosen.values() for sweep in sweeps]
        for at, sweeps in chosen.items():
            del wanted[at]
            mine, found = found[: len(sweeps)], found[len(sweeps) :]
            step(at, mine)
    return [results[at] for at in range(len(searches))]


class OrderedSum:
    """A sum over a tensor's blocks in float64 and in their order, whatever the order in which slabs come."""

    def __init__(self, width: int) -> None:
        self.total = np.zeros(width, np.float64)
        self._next = 0
        self._waiting: dict[int, tuple[int, NDArray[np.float64]]] = {}
        self._lock = Lock()

    def add(self, piece: Piece, blocks: NDArray[np.float64]) -> None:
        """Add what the blocks of one slab [blocks, width] come to."""
        with self._lock:
            self._waiting[piece.start] = (piece.stop, blocks)
            while self._next in self._waiting:
                self._next, ready = self._waiting.pop(self._next)
                for block in ready:
                    self.total += block


def sum_sweep(
    source: Source,
    sizes: Mapping[str, int],
    parts: Sequence[Piece],
    width: int,
    values: Callable[[Piece, Inputs], NDArray[np.float64]],
) -> Sweep:
    """Sum `values` [blocks, width] over the blocks of each tensor; gathers one array [tensors, width]."""
    sums = {name: OrderedSum(width) for name in sizes}

    def look(piece: Piece, inputs: Inputs) -> None:
        sums[piece.tensor].add(piece, values(piece, inputs))

    return Sweep(source, parts, look, lambda: [np.stack([each.total for each in sums.values()])])
