"""Exact k-th largest magnitudes of a stream: a sample brackets them, one pass counts inside the bracket.

Where the sample led astray, the passes that follow bracket the other side. No sort, no copy of the stream: inside a
bracket every float32 has a counter of its own. In a wide one neighbours share a counter, with sums that tell whether
all that was counted is one number, as it is where deltas of 16-bit floats lie on a grid; else another pass looks there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from mediator_cli.engine.streams import Piece
from mediator_cli.engine.sweep import Sweep
from mediator_cli.kernels.ranks import MAGNITUDE, count_offsets, gather_inside, sum_offsets

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from mediator_cli.engine.streams import Inputs
    from mediator_cli.engine.sweep import Search, Source
    from mediator_cli.kernels.arrays import Floats

_TOP = 0x7F800000
"""The bits of infinity: all finite magnitudes lie below."""
_EXACT, _SHARED = 1 << 18, 1 << 16
"""Counters of a bracket: at most so many if each float32 has its own, and so many if neighbours share them."""
_SAMPLE, _RUN = 1 << 17, 1 << 12
"""Entries of a sample, and of each run of neighbours in it."""
_WHOLE_SLABS = 8
"""Slabs of a sample, where they are whole matrices."""
_SIGMAS = 3.0


@dataclass(frozen=True)
class Threshold:
    """The k-th largest magnitude, how many entries lie strictly above it, and how many equal it."""

    value: float
    n_above: int
    n_equal: int


@dataclass(frozen=True)
class Ranked:
    """A stream whose rows are ranked: its slabs, and what of each slab; rows are [n, m].

    If `signed`, these are twice as many as `of` gives: its positive values, and behind them its negative ones turned.
    Where slabs may not be cut further, as whole matrices, `of` may give any number of entries of each: `n_entries` of
    all together.
    """

    source: Source
    parts: Sequence[Piece]
    of: Callable[[Piece, Inputs], Floats]
    n_rows: int
    n_entries: int | None = None
    signed: bool = False

    @property
    def size(self) -> int:
        """Entries in each row."""
        return sum(piece.size for piece in self.parts) if self.n_entries is None else self.n_entries

    def row(self, rows: Floats, at: int) -> Floats:
        """Give one of the rows that are ranked, of what `of` gave for a slab."""
        return _of_one_sign(rows, at) if self.signed else rows[at]

    def rows(self, piece: Piece, inputs: Inputs) -> Floats:
        """Give all rows of a slab [n, m]."""
        rows = self.of(piece, inputs)
        return np.stack([self.row(rows, at) for at in range(self.n_rows)]) if self.signed else rows


@dataclass(frozen=True)
class _Bracket:
    """Where the k-th magnitude of a row is looked for: bits from `low` to `high`, that not included."""

    row: int
    k: int
    low: int
    high: int

    @property
    def shift(self) -> int:
        """How many of the lower bits share a counter."""
        width = self.high - self.low
        return 0 if width <= _EXACT else (width - 1).bit_length() - _SHARED.bit_length() + 1

    def table(self, size: int) -> NDArray[Any]:
        """Make the counters: [n], or with sums and sums of squares [3, n]."""
        n = ((self.high - self.low - 1) >> self.shift) + 1
        # All entries may be equal, as zeros are where an expert is the base.
        return np.zeros((3, n), np.uint64) if self.shift else np.zeros(n, np.uint32 if size < 1 << 32 else np.uint64)


def select(stream: Ranked, ranks: Sequence[Sequence[int]]) -> Search[list[list[Threshold]]]:
    """Find the k-th largest magnitudes, k by row and rank [n][r]; a k beyond the stream gives 0, k = 0 infinity."""
    found, open_brackets = yield from _begin(stream, ranks)
    while open_brackets:
        sweep = _counting(stream, list(open_brackets.values()))
        ((above, *counts),) = yield [sweep]
        for place, n_above, table in zip(list(open_brackets), above.tolist(), counts, strict=True):
            result = _narrow(open_brackets[place], n_above, table)
            if isinstance(result, Threshold):
                del open_brackets[place]
                found[place] = result
            else:
                open_brackets[place] = result
    return [[found[row, at] for at in range(len(ks))] for row, ks in enumerate(ranks)]


def _begin(
    stream: Ranked, ranks: Sequence[Sequence[int]]
) -> Search[tuple[dict[tuple[int, int], Threshold], dict[tuple[int, int], _Bracket]]]:
    """Find by row and rank what a sample tells, and brackets for all else; the sample is given up with that."""
    sample = yield from (_sample(stream) if stream.n_entries is None else _some_whole(stream))
    found: dict[tuple[int, int], Threshold] = {}
    open_brackets: dict[tuple[int, int], _Bracket] = {}
    is_whole = stream.n_entries is None and sample.shape[1] == stream.size
    for row, ks in enumerate(ranks):
        ordered = np.sort(np.abs(sample[row]).view(np.uint32))[::-1]
        for at, k in enumerate(ks):
            if k <= 0 or k > stream.size or is_whole:
                found[row, at] = _known(ordered, k, stream.size)
            else:
                open_brackets[row, at] = _guess(row, k, ordered, stream.size)
    return found, open_brackets


def select_signed(stream: Ranked, ranks: Sequence[Sequence[int]]) -> Search[list[list[Threshold]]]:
    """Find the k-th largest values, of both signs, as `select` finds magnitudes; k from 1 to the stream's size."""
    n, size = stream.n_rows, stream.size
    # The k-th largest is positive among what is left of the values, or negative and the (size + 1 - k)-th of the rest.
    turned = [[size + 1 - k for k in ks] for ks in ranks]
    found = yield from select(replace(stream, n_rows=2 * n, signed=True), [*ranks, *turned])
    pairs = zip(found[:n], found[n:], strict=True)
    return [[_signed(up, down, size) for up, down in zip(*rows, strict=True)] for rows in pairs]


def _of_one_sign(rows: Floats, at: int) -> Floats:
    """Give a row of [n, m] without what is negative, or behind these turned without what is positive; [m]."""
    row: Floats = rows[at] if at < len(rows) else -rows[at - len(rows)]
    return np.maximum(row, np.float32(0))


def _signed(up: Threshold, down: Threshold, size: int) -> Threshold:
    if up.value > 0:
        return up
    if down.value > 0:
        return Threshold(-down.value, size - down.n_above - down.n_equal, down.n_equal)
    return Threshold(0.0, up.n_above, size - up.n_above - down.n_above)


def _sample(stream: Ranked) -> Search[Floats]:
    """Read runs of neighbours, evenly spread; all of a stream that is no larger. Gives [n, entries]."""
    parts = stream.parts if stream.size <= _SAMPLE else _runs(stream.parts, stream.size)
    places: dict[Piece, int] = {}
    filled = 0
    for piece in parts:
        places[piece] = filled
        filled += piece.size
    sample = np.zeros((stream.n_rows, filled), np.float32)

    def look(piece: Piece, inputs: Inputs) -> None:
        sample[:, places[piece] : places[piece] + piece.size] = stream.rows(piece, inputs)

    ((total,),) = yield [Sweep(stream.source, parts, look, lambda: [sample], quick=True)]
    return total


def _some_whole(stream: Ranked) -> Search[Floats]:
    """Look at some slabs, evenly spread, and take evenly spread entries of what they give; [n, entries]."""
    step = -(-len(stream.parts) // _WHOLE_SLABS)
    chosen = stream.parts[step // 2 :: step]
    each = _SAMPLE // len(chosen)
    sample = np.zeros((len(chosen), stream.n_rows, each), np.float32)
    counts = np.zeros(len(chosen), np.int64)
    places = {piece: at for at, piece in enumerate(chosen)}

    def look(piece: Piece, inputs: Inputs) -> None:
        rows = stream.rows(piece, inputs)
        some = rows[:, :: max(1, -(-rows.shape[1] // each))]
        counts[places[piece]] = some.shape[1]
        sample[places[piece], :, : some.shape[1]] = some

    ((rows, lengths),) = yield [Sweep(stream.source, chosen, look, lambda: [sample, counts], quick=True)]
    return np.concatenate([row[:, :length] for row, length in zip(rows, lengths.tolist(), strict=True)], axis=1)


def _runs(parts: Sequence[Piece], size: int) -> list[Piece]:
    """Cut runs of neighbours out of the slabs in which evenly spread positions lie."""
    n_runs = _SAMPLE // _RUN
    wanted = [(2 * at + 1) * size // (2 * n_runs) for at in range(n_runs)]
    chosen: list[Piece] = []
    before = 0
    for piece in parts:
        while len(chosen) < n_runs and wanted[len(chosen)] < before + piece.size:
            start = min(piece.start + wanted[len(chosen)] - before, max(piece.start, piece.stop - _RUN))
            chosen.append(Piece(piece.tensor, start, min(start + _RUN, piece.stop)))
        before += piece.size
    return list(dict.fromkeys(chosen))


def _known(ordered: Floats, k: int, size: int) -> Threshold:
    """Give a threshold that needs no more passes; `ordered` has the bits of all entries, the largest first."""
    if k <= 0:
        return Threshold(float("inf"), 0, 0)
    if k > size:
        return Threshold(0.0, int(np.count_nonzero(ordered)) if len(ordered) == size else size, 0)
    bits = int(ordered[k - 1])
    n_above = int(np.count_nonzero(ordered > bits))
    return Threshold(_float_of(bits), n_above, int(np.count_nonzero(ordered == bits)))


def _guess(row: int, k: int, ordered: Floats, size: int) -> _Bracket:
    """Bracket the k-th of all by the order of a sample, wide enough but for few samples in a thousand."""
    n, share = len(ordered), k / size
    margin = _SIGMAS * math.sqrt(max(share * (1 - share), 1 / n) / n) * n + 1
    first, last = math.floor(share * n - margin), math.ceil(share * n + margin)
    high = int(ordered[first]) + 1 if first >= 0 else _TOP
    low = int(ordered[last]) if last < n else 0
    return _Bracket(row, k, low, high)


def _counting(stream: Ranked, brackets: Sequence[_Bracket]) -> Sweep:
    """Count what lies above each bracket and, with a table for each, inside it."""
    above = np.zeros(len(brackets), np.int64)
    tables = [bracket.table(stream.size) for bracket in brackets]
    locks = [Lock() for _ in brackets]

    def look(piece: Piece, inputs: Inputs) -> None:
        rows = stream.of(piece, inputs)
        gathered = np.empty(rows.shape[1], np.uint32)
        for at, bracket in enumerate(brackets):
            row = stream.row(rows, bracket.row)
            n_above, n_found = gather_inside(row, bracket.low, bracket.high - bracket.low, gathered)
            with locks[at]:
                above[at] += n_above
                if bracket.shift:
                    sum_offsets(gathered, n_found, bracket.shift, tables[at])
                else:
                    count_offsets(gathered, n_found, tables[at])

    return Sweep(stream.source, stream.parts, look, lambda: [above, *tables])


def _narrow(bracket: _Bracket, n_above: int, table: NDArray[Any]) -> _Bracket | Threshold:
    """Look up the counter in which the k-th entry lies; where it lies outside the bracket, turn to that side."""
    counts = table[0] if bracket.shift else table
    from_top = np.cumsum(counts[::-1], dtype=np.int64)
    if bracket.k <= n_above:
        return replace(bracket, low=bracket.high, high=_TOP)
    if bracket.k > n_above + int(from_top[-1]):
        return replace(bracket, low=0, high=bracket.low)
    position = int(np.searchsorted(from_top, bracket.k - n_above))
    before = int(from_top[position - 1]) if position else 0
    at = len(counts) - 1 - position
    low, n_equal = bracket.low + (at << bracket.shift), int(counts[at])
    if bracket.shift:
        _, total, squares = (int(row[at]) for row in table)
        if n_equal * squares != total * total:
            return replace(bracket, low=low, high=min(low + (1 << bracket.shift), bracket.high))
        # No spread: all that was counted here is the same number.
        low += total // n_equal
    return Threshold(_float_of(low), n_above + before, n_equal)


def _float_of(bits: int) -> float:
    return float(np.uint32(bits & MAGNITUDE).view(np.float32))
