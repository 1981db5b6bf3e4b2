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
    upper = _total(mapper(lambda piece: count_upper(ranked(piece)), parts), len(ks), _UPPER)
    buckets = [_bucket_of(row, k) for row, k in zip(upper, ks, strict=True)]
    lower = _total(mapper(lambda piece: count_lower(ranked(piece), [b for b, _ in buckets]), parts), len(ks), _LOWER)
    found = []
    for (bucket, above), low, up, k in zip(buckets, lower, upper, ks, strict=True):
        inner, n_above = _bucket_of(low, k - above)
        found.append(_threshold(bucket, inner, above + n_above, k, up))
    return found


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
