"""How much experts disagree: counts in blocks of deltas, and scores of a unit from summed counts.

Reading of Mediator (arXiv 2502.04411): conflict of a pair is the share of opposite signs among the entries that both
changed, and a unit's score is the mean over pairs. With independent random signs it is 0.5 for any number of experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from mediator_cli.kernels.conflict import count_blocks, sum_moments

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mediator_cli.kernels.arrays import Doubles, Floats
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


@dataclass(frozen=True)
class Rule:
    """Which entries of a delta are kept: those with |x - mean| > limit; float32 [n] each, by expert."""

    means: Floats
    limits: Floats


def keep_nonzero(n: int) -> Rule:
    """Keep every entry of n experts; zeros are in no count anyway."""
    return Rule(np.zeros(n, np.float32), np.zeros(n, np.float32))


def far_from_mean(moments: Doubles, size: int, n_std: float) -> Rule:
    """Keep what is further than `n_std` population standard deviations from the mean of a tensor of that size.

    `moments` [2, n] are the sums of x and x² over the tensor.
    """
    mean = moments[0] / size
    std = np.sqrt(np.maximum(moments[1] / size - mean * mean, 0.0))
    return Rule(mean.astype(np.float32), (n_std * std).astype(np.float32))


def keep_at_least(thresholds: Floats) -> Rule:
    """Keep what reaches its expert's threshold [n] in magnitude."""
    below = np.nextafter(thresholds, np.float32(-np.inf))
    return Rule(np.zeros(len(thresholds), np.float32), below)


def count_conflicts(deltas: Floats, rule: Rule, block: int) -> Doubles:
    """Count conflicts in each block of so many entries of deltas [n, m]; [blocks, 3·n² + n + 2], see `unpack_counts`.

    The sum over the blocks of a tensor, in their order, has the counts of the tensor.
    """
    n, m = deltas.shape
    counts = np.empty((-(-m // block), 3 * n * n + n + 2), np.float64)
    count_blocks(deltas, rule.means, rule.limits, block, counts)
    return counts


def block_moments(deltas: Floats, block: int) -> Doubles:
    """Sum x and x² over each block of so many entries of deltas [n, m]; [blocks, 2, n]."""
    n, m = deltas.shape
    moments = np.empty((-(-m // block), 2, n), np.float64)
    sum_moments(deltas, block, moments)
    return moments


def unpack_counts(vector: Doubles, n: int) -> ConflictCounts:
    """Read a row, or the sum of rows, of `count_conflicts` for n experts."""
    opposite, both, gram = vector[: 3 * n * n].reshape(3, n, n)
    *support, any_opposite, shared = vector[3 * n * n :].tolist()
    return ConflictCounts(
        opposite=tuple(tuple(round(x) for x in row) for row in opposite.tolist()),
        both=tuple(tuple(round(x) for x in row) for row in both.tolist()),
        support=tuple(round(x) for x in support),
        any_opposite=round(any_opposite),
        shared=round(shared),
        gram=tuple(tuple(row) for row in gram.tolist()),
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
