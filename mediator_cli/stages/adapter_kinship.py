"""Kinship of low-rank deltas from their factors alone: sums over pairs as of whole deltas, and overlap of subspaces.

With B·A = U·diag(s)·V, <B₁A₁, B₂A₂> is the sum over all directions of s₁s₂ · (U₁ᵀU₂) · (V₁V₂ᵀ): two small tables for
each matrix hold what is to know of all pairs of adapters, and no delta is ever written out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mediator_cli.stages.kinship import PairSums

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mediator_cli.kernels.arrays import Doubles
    from mediator_cli.kernels.factors import Factors

_NOTHING = 1e-6
"""Share of the largest singular value below which a direction is rounding of stored factors."""


@dataclass(frozen=True)
class Directions:
    """A delta as left · diag(sizes) · right: orthonormal left [out, r], right [r, in]; sizes [r] falling; float64."""

    left: Doubles
    sizes: Doubles
    right: Doubles


@dataclass(frozen=True)
class Overlap:
    """Tables [n, n] for one matrix, in [0, 1]: shared directions of outputs and of inputs; NaN where one has none."""

    outputs: Doubles
    inputs: Doubles


def directions_of(factors: Factors) -> Directions:
    """Find the directions of scaling · b · a, as many as its numerical rank."""
    left, below = np.linalg.qr(factors.b.astype(np.float64))
    right, beside = np.linalg.qr(factors.a.T.astype(np.float64))
    turned, sizes, other = np.linalg.svd(factors.scaling * (below @ beside.T))
    rank = int((sizes > _NOTHING * sizes[0]).sum()) if sizes.size else 0
    return Directions(left @ turned[:, :rank], sizes[:rank], other[:rank] @ right.T)


def low_rank_sums(parts: Sequence[Directions | None], shape: tuple[int, int]) -> tuple[PairSums, Overlap]:
    """Sum the entries of n deltas of one matrix and the products of their pairs; None where an adapter has none.

    The overlap of subspaces is ||UᵢᵀUⱼ||²_F / min(rᵢ, rⱼ), of inputs with V: 1 where one is in the other, 0 where they
    are orthogonal.
    """
    ranks = np.array([0 if part is None else len(part.sizes) for part in parts])
    known = [part for part in parts if part is not None]
    left = np.concatenate([np.empty((shape[0], 0)), *(part.left for part in known)], axis=1)
    right = np.concatenate([np.empty((0, shape[1])), *(part.right for part in known)])
    sizes = np.concatenate([np.empty(0), *(part.sizes for part in known)])
    lefts, rights = left.T @ left, right @ right.T
    owner = np.repeat(np.eye(len(parts)), ranks, axis=1)
    gram = owner @ (lefts * rights * np.outer(sizes, sizes)) @ owner.T
    sums = PairSums(shape[0] * shape[1], owner @ (left.sum(axis=0) * sizes * right.sum(axis=1)), gram)
    smaller = np.minimum.outer(ranks, ranks).astype(np.float64)
    smaller[smaller == 0] = np.nan
    shared = [np.clip(owner @ np.square(table) @ owner.T / smaller, 0.0, 1.0) for table in (lefts, rights)]
    return sums, Overlap(*shared)


def mean_overlap(parts: Sequence[Overlap], n: int) -> Overlap:
    """Average over matrices; a matrix in which one of two adapters has no direction has no say in their overlap."""
    return Overlap(_mean([part.outputs for part in parts], n), _mean([part.inputs for part in parts], n))


def _mean(tables: Sequence[Doubles], n: int) -> Doubles:
    if not tables:
        return np.full((n, n), np.nan)
    stack = np.stack(tables)
    count = (~np.isnan(stack)).sum(axis=0).astype(np.float64)
    count[count == 0] = np.nan
    return np.asarray(np.nansum(stack, axis=0) / count)
