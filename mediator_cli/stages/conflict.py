"""How much experts disagree: counts of one block of deltas, and scores of a unit from summed counts.

Reading of Mediator (arXiv 2502.04411): conflict of a pair is the share of opposite signs among the entries that both
changed, and a unit's score is the mean over pairs. With independent random signs it is 0.5 for any number of experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mediator_cli.recipe.schema import Measure


@dataclass(frozen=True)
class ConflictCounts:
    """Counts over some entries: [n, n] pair tables as lists, exact integers but for `gram`.

    `opposite`: both kept, signs differ. `both`: both kept. `support`: kept, by expert. `any_opposite`: any two
    differ. `shared`: kept by two or more. `gram`: inner products of the deltas before denoising, float64.
    """

    opposite: tuple[tuple[int, ...], ...]
    both: tuple[tuple[int, ...], ...]
    support: tuple[int, ...]
    any_opposite: int
    shared: int
    gram: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class ConflictScores:
    """The scores of one unit, each in [0, 1] but the cosine in [-1, 1]."""

    sign: float
    any_sign: float
    cosine: float
    overlap: float

    def by(self, measure: Measure) -> float:
        """Return the score of a measure; higher is more conflict."""
        return {"sign": self.sign, "any_sign": self.any_sign, "cosine": (1 - self.cosine) / 2}[measure]


def count_block(deltas: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Count conflicts in one block of deltas [n, m] under a mask `kept` [n, m]; a flat float64 vector.

    Products of 0/1 matrices count exactly in float32 as long as m is below 2²⁴.
    """
    positive = (kept & (deltas > 0)).float()
    negative = (kept & (deltas < 0)).float()
    used = positive + negative
    crossed = positive @ negative.T
    wide = deltas.double()
    disagree = (positive.amax(0) * negative.amax(0)).sum()
    shared = (used.sum(0) >= 2).sum()
    tables = [(crossed + crossed.T).double(), (used @ used.T).double(), wide @ wide.T]
    scalars = torch.stack([disagree.double(), shared.double()])
    return torch.cat([*(table.flatten() for table in tables), used.double().sum(1), scalars])


def unpack_counts(vector: torch.Tensor, n: int) -> ConflictCounts:
    """Read summed vectors of `count_block` for n experts."""
    values = vector.tolist()
    tables = [[values[at + i * n : at + (i + 1) * n] for i in range(n)] for at in (0, n * n, 2 * n * n)]
    rest = values[3 * n * n :]
    return ConflictCounts(
        opposite=tuple(tuple(int(x) for x in row) for row in tables[0]),
        both=tuple(tuple(int(x) for x in row) for row in tables[1]),
        support=tuple(int(x) for x in rest[:n]),
        any_opposite=int(rest[n]),
        shared=int(rest[n + 1]),
        gram=tuple(tuple(row) for row in tables[2]),
    )


def score_counts(parts: Iterable[ConflictCounts]) -> ConflictScores:
    """Score a unit from the counts of its tensors."""
    counts = list(parts)
    pairs = list(combinations(range(len(counts[0].support)), 2)) if counts else []
    if not pairs:
        return ConflictScores(0.0, 0.0, 1.0, 0.0)
    sign = [_share(counts, i, j) for i, j in pairs]
    overlap = [_overlap(counts, i, j) for i, j in pairs]
    cosine = [_cosine(counts, i, j) for i, j in pairs]
    any_sign = sum(c.any_opposite for c in counts) / max(1, sum(c.shared for c in counts))
    return ConflictScores(_mean(sign), any_sign, _mean(cosine), _mean(overlap))


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def _share(counts: list[ConflictCounts], i: int, j: int) -> float:
    return sum(c.opposite[i][j] for c in counts) / max(1, sum(c.both[i][j] for c in counts))


def _overlap(counts: list[ConflictCounts], i: int, j: int) -> float:
    both = sum(c.both[i][j] for c in counts)
    return both / max(1, sum(c.support[i] + c.support[j] for c in counts) - both)


def _cosine(counts: list[ConflictCounts], i: int, j: int) -> float:
    inner, left, right = (math.fsum(c.gram[a][b] for c in counts) for a, b in ((i, j), (i, i), (j, j)))
    return inner / math.sqrt(left * right) if left > 0 and right > 0 else 0.0


def moments_block(deltas: torch.Tensor) -> torch.Tensor:
    """Sum x and x² of one block of deltas [n, m]; float64 [2, n]."""
    wide = deltas.double()
    return torch.stack([wide.sum(dim=1), (wide * wide).sum(dim=1)])


def far_from_mean(deltas: torch.Tensor, moments: torch.Tensor, size: int, n_std: float) -> torch.Tensor:
    """Mask the entries further than `n_std` population standard deviations from their tensor's mean; bool [n, m]."""
    mean = moments[0] / size
    std = (moments[1] / size - mean * mean).clamp_min(0).sqrt()
    return (deltas - mean.float()[:, None]).abs() > (n_std * std).float()[:, None]


def at_least(deltas: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """Mask the entries whose magnitude reaches their expert's threshold [n]; bool [n, m]."""
    return deltas.abs() >= thresholds[:, None]
