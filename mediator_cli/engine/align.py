"""Weight matching by streaming: the gains of places and units, block by block, and the descent over all units."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from threadpoolctl import threadpool_limits

from mediator_cli.checkpoint.permuted import Axes, PermutedReader
from mediator_cli.engine.pool import run_all
from mediator_cli.engine.streams import RUNTIME_BYTES, Piece, fill
from mediator_cli.errors import OutputError, Problem
from mediator_cli.kernels.random import fill_uniforms
from mediator_cli.stages.align import LEAST_GAIN, assign, best_in_groups, entries_of, is_identity, is_order, nearest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from mediator_cli.checkpoint.read import Reader
    from mediator_cli.kernels.arrays import Counts, Doubles, Floats
    from mediator_cli.plan.units import Side, Units

Orders = dict[str, "Counts"]
"""By the name of units: which of them comes to stand at each place."""
_CHUNK = 1 << 21
"""Entries that are multiplied with as many others at a time; fixed, so that bits do not depend on the memory."""


@dataclass(frozen=True)
class Pair:
    """Two sources with the same tensors: `moving` gets the order of `target`; only `voters` have a say in it."""

    target: Reader
    moving: Reader
    names: tuple[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    voters: frozenset[str]


@dataclass(frozen=True)
class Effort:
    """How orders are looked for: passes at most, the seed of their order, threads, and bytes for one table of gains."""

    max_passes: int
    seed: int
    workers: int
    memory: int


def axes_of(units: Sequence[Units], orders: Orders, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Axes]:
    """Say by tensor how its axes are to be read for its units to stand in their orders."""
    found: dict[str, dict[int, Counts]] = {}
    for one in units:
        if not is_identity(orders[one.name]):
            for side in one.sides:
                # A vector is one row.
                axis = side.axis if len(shapes[side.tensor]) > 1 else 1
                found.setdefault(side.tensor, {})[axis] = entries_of(orders[one.name], side.width, side.share)
    return {name: Axes(shapes[name][-1], each.get(0), each.get(1)) for name, each in found.items()}


def match_units(pair: Pair, units: Sequence[Units], effort: Effort, advance: Callable[[int], None]) -> Orders:
    """Find the orders of all units in which the moving source is most like the target.

    Coordinate descent: each in turn gets the best order for those of the others, until none gets better. `advance` is
    told of the entries of each source that have been compared. Raises OutputError where the memory is too little.
    """
    orders: Orders = {one.name: np.arange(one.size) for one in units}
    are_free = _are_independent(units)
    with threadpool_limits(1, user_api="blas"):
        for number in range(1 if are_free else effort.max_passes):
            moved = False
            for at in _visits(len(units), effort.seed, number):
                found = _best(pair, units, at, orders, effort)
                moved |= not np.array_equal(found, orders[units[at].name])
                orders[units[at].name] = found
                advance(voting_entries(units[at], pair))
            if not moved:
                break
    return orders


def voting_entries(units: Units, pair: Pair) -> int:
    """Count the entries of each source that have a say in the order of some units."""
    return sum(int(np.prod(pair.shapes[side.tensor])) for side in units.sides if side.tensor in pair.voters)


def _are_independent(units: Sequence[Units]) -> bool:
    """Whether no tensor has units on two axes, so that one pass finds the best of all."""
    counts = Counter(name for one in units for name in {side.tensor for side in one.sides})
    return max(counts.values(), default=1) == 1 and not any(one.group == "residual" for one in units)


def _visits(count: int, seed: int, number: int) -> list[int]:
    """Shuffle so many units, in another way for each pass."""
    key = hashlib.blake2b(f"{seed}\0align\0{number}".encode(), digest_size=8).digest()
    drawn = np.empty(count, np.float32)
    fill_uniforms(int.from_bytes(key, "little") >> 1, 0, drawn)
    return [int(at) for at in np.argsort(drawn, kind="stable")]


def _best(pair: Pair, units: Sequence[Units], at: int, orders: Orders, effort: Effort) -> Counts:
    """Find the best order of one kind of units for those of all others."""
    one, standing = units[at], orders[units[at].name]
    others = [other for other in units if other is not one]
    moving = PermutedReader(pair.moving, axes_of(others, orders, pair.shapes))
    sides = [side for side in one.sides if side.tensor in pair.voters]
    own, shared = ([side for side in sides if (side.share > 1) == is_shared] for is_shared in (False, True))
    if one.per_group == 1:
        return _best_alone(_Gains(pair, moving, own, one.size), standing, one, effort)
    gains = _Gains(pair, moving, own, one.size)
    of_groups = _Gains(pair, moving, shared, one.size // one.per_group)
    return best_in_groups(gains.all(effort.workers), of_groups.all(effort.workers), standing)


def _best_alone(gains: _Gains, standing: Counts, one: Units, effort: Effort) -> Counts:
    """Find the best order of units that are bound to no group; a whole table of gains is kept only if it has room."""
    n, workers = one.size, max(1, min(effort.workers, effort.memory // gains.block_bytes))
    losses = np.empty((n, n)) if workers * gains.block_bytes + 8 * n * n <= effort.memory else None
    quick, better = np.empty(n, np.int64), np.empty(n)

    def look(part: slice) -> None:
        block = gains.rows(part)
        places = np.arange(len(block))
        quick[part] = nearest(block, standing[part])
        better[part] = block[places, quick[part]] - block[places, standing[part]]
        if losses is not None:
            np.negative(block, out=losses[part])

    run_all(look, gains.parts(), workers)
    if is_order(quick):
        return quick if better.sum() > LEAST_GAIN else standing
    if losses is None:
        least = RUNTIME_BYTES + workers * gains.block_bytes + 8 * n * n
        message = f"the {n} units of {one.name} are hard to align and need a table of {-(-8 * n * n >> 20)} MiB"
        hint = f"give at least {-(-least >> 20)} MiB, or leave {one.group} out of `align.groups`"
        raise OutputError(Problem("--memory", message, hint))
    found, places = assign(losses), np.arange(n)
    return found if (losses[places, standing] - losses[places, found]).sum() > LEAST_GAIN else standing


@dataclass(frozen=True)
class _Gains:
    """The inner products of `n` places of the target with as many units of the moving source, over some sides."""

    pair: Pair
    moving: Reader
    sides: Sequence[Side]
    n: int

    def _length(self, side: Side) -> int:
        """Give the entries of one unit that lie together: its rows, or its part of a row."""
        shape = self.pair.shapes[side.tensor]
        return side.width * shape[-1] if side.axis == 0 and len(shape) > 1 else side.width

    @property
    def _step(self) -> int:
        longest = max((self._length(side) for side in self.sides), default=1)
        return min(1024, max(1, _CHUNK // longest))

    @property
    def block_bytes(self) -> int:
        """Bound the bytes that a worker takes for the gains of a block of places, with what they are made of."""
        return 16 * min(self._step, self.n) * self.n + 32 * _CHUNK

    def parts(self) -> list[slice]:
        """Cut the places into blocks."""
        return [slice(first, min(first + self._step, self.n)) for first in range(0, self.n, self._step)]

    def all(self, workers: int) -> Doubles:
        """Give all gains [n, n]."""
        found = np.zeros((self.n, self.n))

        def look(part: slice) -> None:
            found[part] = self.rows(part)

        run_all(look, self.parts(), workers)
        return found

    def rows(self, part: slice) -> Doubles:
        """Give the gains of some places, [m, n]."""
        found = np.zeros((part.stop - part.start, self.n))
        for side in self.sides:
            is_column = side.axis == 1
            (self._add_columns if is_column else self._add_rows)(side, part, found)
        return found

    def _add_rows(self, side: Side, part: slice, out: Doubles) -> None:
        """Add the products of units that are rows."""
        length = self._length(side)
        ours = self._read(0, side.tensor, part.start * length, part.stop * length).reshape(-1, length)
        step = max(1, _CHUNK // length)
        for first in range(0, self.n, step):
            last = min(first + step, self.n)
            theirs = self._read(1, side.tensor, first * length, last * length).reshape(-1, length)
            out[:, first:last] += ours @ theirs.T

    def _add_columns(self, side: Side, part: slice, out: Doubles) -> None:
        """Add the products of units that are columns, over some rows at a time."""
        n_rows, n_columns = self.pair.shapes[side.tensor]
        step = max(1, _CHUNK // n_columns)
        for first in range(0, n_rows, step):
            last = min(first + step, n_rows)
            ours, theirs = (
                self._read(who, side.tensor, first * n_columns, last * n_columns).reshape(last - first, self.n, -1)
                for who in (0, 1)
            )
            out += _by_unit(ours[:, part]) @ _by_unit(theirs).T

    def _read(self, who: int, tensor: str, start: int, stop: int) -> Floats:
        out = np.empty(stop - start, np.float32)
        reader = (self.pair.target, self.moving)[who]
        fill(reader, self.pair.names[who], Piece(tensor, start, stop), out)
        return out


def _by_unit(rows: Floats) -> Floats:
    """Turn rows [k, n, width] into one vector for each unit [n, k · width]."""
    return np.ascontiguousarray(rows.swapaxes(0, 1)).reshape(rows.shape[1], -1)
