"""Exact k-th largest magnitude of a stream, by two histograms of the bits: no sort, no copy of the stream.

The magnitude of a float32 is ordered like its bits without the sign. The first pass counts the upper 15 bits,
the second the lower 16 bits inside the bucket where the k-th entry lies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from mediator_cli.engine.streams import Piece

    Ranked = Callable[[Piece], torch.Tensor]
    Mapper = Callable[[Ranked, Sequence[Piece]], Iterable[torch.Tensor]]

_UPPER = 1 << 15
_LOWER = 1 << 16
_RANKS_AT_ONCE = 4
"""More would read the stream less often, but each takes half a megabyte for every row and slab in flight."""


@dataclass(frozen=True)
class Threshold:
    """The k-th largest magnitude, how many entries lie strictly above it, and an upper bound of the largest."""

    value: float
    n_above: int
    bound: float


def _bits(rows: torch.Tensor) -> torch.Tensor:
    return rows.abs().contiguous().view(torch.int32)


def count_upper(rows: torch.Tensor) -> torch.Tensor:
    """Count the upper 15 bits of the magnitudes in rows [n, m]; int64 [n, 32768]."""
    return torch.stack([torch.bincount(row, minlength=_UPPER) for row in _bits(rows) >> 16])


def count_lower(rows: torch.Tensor, buckets: Sequence[int]) -> torch.Tensor:
    """Count the lower 16 bits of the magnitudes whose upper bits are their row's bucket; int64 [n, 65536]."""
    counts = []
    for row, bucket in zip(_bits(rows), buckets, strict=True):
        inside = row[(row >> 16) == bucket] & (_LOWER - 1)
        counts.append(torch.bincount(inside, minlength=_LOWER))
    return torch.stack(counts)


def select_magnitudes(
    parts: Sequence[Piece],
    ranked: Ranked,
    ks: Sequence[int],
    mapper: Mapper,
) -> list[Threshold]:
    """Find the k-th largest magnitude of each row of a stream; `ranked` gives rows [n, m] of one piece.

    k = 0 gives an infinite threshold; a k beyond the stream gives 0.
    """
    return [found for (found,) in select_ranks(parts, ranked, [[k] for k in ks], mapper)]


def select_ranks(
    parts: Sequence[Piece],
    ranked: Ranked,
    ranks: Sequence[Sequence[int]],
    mapper: Mapper,
) -> list[list[Threshold]]:
    """Find several largest magnitudes of each row, as many in all rows: `ranks` [n][r]; see `select_magnitudes`."""
    n_ranks = len(ranks[0])
    upper = _total(mapper(lambda piece: count_upper(ranked(piece)), parts), len(ranks), _UPPER)
    found: list[list[Threshold]] = [[] for _ in ranks]
    for first in range(0, n_ranks, _RANKS_AT_ONCE):
        chunk = [list(row[first : first + _RANKS_AT_ONCE]) for row in ranks]
        for row, more in zip(found, _refine(parts, ranked, upper, chunk, mapper), strict=True):
            row += more
    return found


def _refine(
    parts: Sequence[Piece], ranked: Ranked, upper: torch.Tensor, ranks: list[list[int]], mapper: Mapper
) -> list[list[Threshold]]:
    """Look into the buckets where the entries of these ranks lie: [n][r]."""
    buckets = [[_bucket_of(row, k) for k in ks] for row, ks in zip(upper, ranks, strict=True)]
    wanted = [[buckets[row][at][0] for row in range(len(ranks))] for at in range(len(ranks[0]))]

    def count(piece: Piece) -> torch.Tensor:
        rows = ranked(piece)
        return torch.cat([count_lower(rows, chosen) for chosen in wanted])

    lower = _total(mapper(count, parts), len(wanted) * len(ranks), _LOWER)
    found: list[list[Threshold]] = []
    for row, (ks, places) in enumerate(zip(ranks, buckets, strict=True)):
        found.append([])
        for at, (k, (bucket, above)) in enumerate(zip(ks, places, strict=True)):
            inner, n_above = _bucket_of(lower[at * len(ranks) + row], k - above)
            found[row].append(_threshold(bucket, inner, above + n_above, k, upper[row]))
    return found


def select_passes(n_ranks: int) -> int:
    """Count how often a stream is read to find that many ranks."""
    return 1 + -(-n_ranks // _RANKS_AT_ONCE)


def _total(counts: Iterable[torch.Tensor], n: int, width: int) -> torch.Tensor:
    total = torch.zeros(n, width, dtype=torch.int64)
    for count in counts:
        total += count
    return total


def _bucket_of(counts: torch.Tensor, k: int) -> tuple[int, int]:
    """Find the bucket of the k-th largest and the number of entries above that bucket."""
    from_top = counts.flip(0).cumsum(0)
    position = int(torch.searchsorted(from_top, k)) if k > 0 else 0
    position = min(position, len(counts) - 1)
    return len(counts) - 1 - position, int(from_top[position - 1]) if position else 0


def _threshold(bucket: int, inner: int, n_above: int, k: int, upper: torch.Tensor) -> Threshold:
    filled = torch.nonzero(upper)
    top = int(filled[-1]) if len(filled) else 0
    bound = _float_of(((top + 1) << 16) - 1) if top < _UPPER - 1 else float("inf")
    if k <= 0:
        return Threshold(float("inf"), 0, bound)
    if k > int(upper.sum()):
        return Threshold(0.0, int(upper.sum()), bound)
    return Threshold(_float_of((bucket << 16) | inner), n_above, bound)


def _float_of(bits: int) -> float:
    return float(torch.tensor([bits], dtype=torch.int32).view(torch.float32))
