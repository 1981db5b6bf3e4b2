"""Model kinship: how alike the deltas of experts are, who resembles whom, and which experts to merge.

Reading of Model Kinship (arXiv 2410.12613): of two experts, the Pearson correlation, the cosine and the Euclidean
distance of their deltas. Experts of low kinship have learned different things; merging near relatives gains little.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from itertools import combinations
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from mediator_cli.kernels.conflict import sum_moments
from mediator_cli.kernels.kinship import sum_pairs

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from mediator_cli.kernels.arrays import Doubles, Flags, Floats

Metric = Literal["pcc", "cosine", "euclidean", "overlap", "output"]
METRICS: tuple[Metric, ...] = get_args(Metric)
DISTANCES: tuple[Metric, ...] = ("euclidean", "output")
"""Metrics in which less is nearer."""
LEVELS = 127
"""The largest value of eight bits with a sign."""
_NOTHING = 1e-12
"""Share of its energy below which a delta's variance is rounding alone."""
_SAME = 1e-13
"""Share of two deltas' energy below which their difference is rounding alone."""


@dataclass(frozen=True)
class PairSums:
    """Sums over `size` entries of n deltas, float64: `first` [n] of each, `gram` [n, n] of the products of pairs."""

    size: int
    first: Doubles
    gram: Doubles

    def __add__(self, other: PairSums) -> PairSums:
        return PairSums(self.size + other.size, self.first + other.first, self.gram + other.gram)


@dataclass(frozen=True)
class Kinship:
    """Tables [n, n], float64: `pcc` and `cosine` in [-1, 1], NaN where a delta is zero (pcc: constant); `euclidean`.

    `overlap` is of subspaces, in [0, 1]; `output` is a distance of answers. None where they were not measured.
    """

    pcc: Doubles
    cosine: Doubles
    euclidean: Doubles
    overlap: Doubles | None = None
    output: Doubles | None = None

    def table(self, metric: Metric) -> Doubles:
        """Give the table of a metric; all NaN where it was not measured."""
        found: Doubles | None = getattr(self, metric)
        return np.full_like(self.pcc, np.nan) if found is None else found

    def by(self, metric: Metric) -> Doubles:
        """Give a table in which more is closer kin: a distance is negative."""
        return -self.table(metric) if metric in DISTANCES else self.table(metric)


@dataclass(frozen=True)
class Branch:
    """Two clusters of experts that become one; `kinship` is the mean over all pairs between them."""

    left: tuple[int, ...]
    right: tuple[int, ...]
    kinship: float


def block_sums(deltas: Floats, block: int) -> Doubles:
    """Sum deltas [n, m] and their products over each block of so many entries; [blocks, n + n²], see `unpack_sums`."""
    n, m = deltas.shape
    moments, gram = np.empty((-(-m // block), 2, n)), np.empty((-(-m // block), n, n))
    sum_moments(deltas, block, moments)
    sum_pairs(deltas, block, gram)
    return np.concatenate([moments[:, 0], gram.reshape(len(gram), n * n)], axis=1)


def unpack_sums(vector: Doubles, n: int, size: int) -> PairSums:
    """Read the sum of rows of `block_sums` over a tensor of that size."""
    return PairSums(size, vector[:n], vector[n:].reshape(n, n))


def to_int8(deltas: Floats, largest: Floats) -> Floats:
    """Round deltas [n, m] to whole numbers up to ±127, the value of the `largest` magnitude [n]; float32.

    A row whose largest is 0 is all zeros.
    """
    safe = np.where(largest > 0, largest, np.float32(1))
    return np.rint(np.float32(LEVELS) * (deltas / safe[:, None]))


def measure_kinship(parts: Iterable[PairSums], *, split: bool = False) -> Kinship:
    """Measure kinship over some tensors, all entries together.

    With `split` each tensor by itself, and the mean by size: a value that is undefined has no say in it.
    """
    known = list(parts)
    if not split:
        return _kinship(reduce(PairSums.__add__, known))
    each, sizes = [_kinship(part) for part in known], [part.size for part in known]
    means = [_mean_by_size([getattr(one, name) for one in each], sizes) for name in ("pcc", "cosine", "euclidean")]
    return Kinship(*means)


def _mean_by_size(tables: Sequence[Doubles], sizes: Sequence[int]) -> Doubles:
    stack, weights = np.stack(tables), np.array(sizes, np.float64)[:, None, None]
    is_known = ~np.isnan(stack)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(is_known, stack * weights, 0.0).sum(0) / np.where(is_known, weights, 0.0).sum(0))


def _kinship(sums: PairSums) -> Kinship:
    energy = np.diag(sums.gram)
    squares = energy[:, None] + energy[None, :] - 2 * sums.gram
    covariance = sums.gram - np.outer(sums.first, sums.first) / sums.size
    is_flat = np.diag(covariance) <= _NOTHING * energy
    return Kinship(
        pcc=_normalised(covariance, is_flat),
        cosine=_normalised(sums.gram, energy <= 0),
        euclidean=np.sqrt(np.where(squares > _SAME * (energy[:, None] + energy[None, :]), squares, 0.0)),
    )


def _normalised(table: Doubles, is_undefined: Flags) -> Doubles:
    """Divide by the roots of the diagonal; NaN in the rows and columns of what is undefined."""
    scale = np.sqrt(np.where(is_undefined, np.nan, np.diag(table)))
    return np.asarray(np.clip(table / np.outer(scale, scale), -1.0, 1.0))


def without_sign(kinship: Kinship) -> Kinship:
    """Give the cosine its authors' form, the root of its square, which loses the sign."""
    return replace(kinship, cosine=np.abs(kinship.cosine))


def same_deltas(kinship: Kinship) -> list[tuple[int, ...]]:
    """Group experts whose deltas are the same, but for rounding; those of nothing are no group."""
    is_same = (kinship.euclidean == 0) & ~np.isnan(kinship.cosine)
    groups = {tuple(int(at) for at in np.flatnonzero(row)) for row in is_same}
    return sorted(group for group in groups if len(group) > 1)


def cluster(kin: Doubles) -> list[Branch]:
    """Join the clusters of the highest mean kinship until one is left, by a table of `Kinship.by` [n, n].

    Ties go to the first in order. A pair without a value counts as one that is less kin than all others.

    >>> [(b.left, b.right) for b in cluster(np.array([[1, 0.1, 0.8], [0.1, 1, 0.2], [0.8, 0.2, 1]]))]
    [((0,), (2,)), ((0, 2), (1,))]
    """
    known = kin[~np.isnan(kin)]
    table = np.where(np.isnan(kin), known.min(initial=0.0), kin)
    clusters: list[tuple[int, ...]] = [(at,) for at in range(len(kin))]
    branches: list[Branch] = []
    while len(clusters) > 1:
        pairs = list(combinations(clusters, 2))
        means = [float(table[np.ix_(left, right)].mean()) for left, right in pairs]
        left, right = pairs[int(np.argmax(means))]
        branches.append(Branch(left, right, max(means)))
        clusters = [left + right if one == left else one for one in clusters if one != right]
    return branches


def complementary(kin: Doubles) -> list[tuple[int, float]]:
    """Order experts greedily: the pair of the lowest kinship, then always who is least kin to those before.

    Gives experts with the mean kinship of all pairs up to each, NaN for the first. Pairs without a value take no part.

    >>> complementary(np.array([[1, 0.1, 0.8], [0.1, 1, 0.2], [0.8, 0.2, 1]]))[1]
    (1, 0.1)
    """
    pairs = [(float(kin[i, j]), i, j) for i, j in combinations(range(len(kin)), 2) if not np.isnan(kin[i, j])]
    if not pairs:
        return []
    lowest, first, second = min(pairs)
    chosen, found = [first, second], [(first, float("nan")), (second, lowest)]
    while rest := [i for i in range(len(kin)) if i not in chosen and not np.isnan(kin[i, chosen]).any()]:
        chosen.append(min(rest, key=lambda i: float(kin[i, chosen].mean())))
        found.append((chosen[-1], float(np.mean([kin[i, j] for i, j in combinations(chosen, 2)]))))
    return found
