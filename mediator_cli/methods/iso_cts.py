"""Common and task-specific directions, all with the same singular value."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from mediator_cli.kernels.arrays import Doubles, Floats
from mediator_cli.methods._matrix import Embeddings, Svd, doubles, mean_delta, polar, summed, triplets
from mediator_cli.methods._ops import Lambda
from mediator_cli.methods.registry import merge_method
from mediator_cli.methods.statistics import linear_maps


def _sizes(rank: int, n: int, share: float) -> tuple[int, int]:
    """Count common directions and those of each expert: what is left of the rank, rounded to a multiple of n."""
    own = round((rank - int(rank * share)) / n)
    # Half a multiple may round up beyond the rank.
    own = min(own, rank // n)
    return rank - own * n, own


def _own_part(delta: Doubles, common: Doubles, most: int) -> Svd:
    """Take apart what of a delta lies outside the common left directions [rows, k]."""
    rest = delta - common @ (common.T @ delta)
    # Beside the delta itself, what is left of one that lies inside is rounding.
    return triplets(rest, most, scale=float(np.linalg.norm(delta)))


def _working_bytes(n: int, rows: int, columns: int) -> int:
    """The sum, one delta, its rest, all vectors on both sides and their polar factors."""
    short, long = sorted((rows, columns))
    return 8 * (6 * rows * columns + 4 * short * (short + long) + 7 * short**2)


@merge_method(
    space="delta",
    reference="https://arxiv.org/abs/2502.04959",
    view=linear_maps,
    working_bytes=_working_bytes,
)
def iso_cts(
    deltas: Floats,
    weights: Doubles,
    *,
    common_share: Annotated[
        float,
        Field(ge=0, le=1, description="Share of the rank for directions of the sum; the rest is the experts' own."),
    ] = 0.8,
    lambda_: Lambda = 1.0,
    embeddings: Embeddings = "average",
) -> Floats:
    """Keep common directions, add those of single experts, give all the same singular value.

    Of Δ = Σ wₜ·τₜ the top k singular triplets stay; to these come the top q of each wₜ·τₜ less its part inside the k
    left vectors, with n·q + k = min(rows, columns). The left vectors together become the nearest orthonormal ones, so
    do the right ones, and the result is λ · mean of all those singular values · U·Vᵀ. Singular values that rounding
    of float32 may have made are left out. All that is no matrix is averaged: λ · Σ wₜ·τₜ / n.

    Apt when there are many experts, of which `iso_c` drops what only one of them needs.

    Not apt when deltas are full of noise, which gets as loud as the rest; see `iso_c`.

    Elsewhere: the authors and fusion_bench treat embeddings as matrices (`embeddings: matrix`), and fill up with
    directions by chance where the rank is not full. With more experts than a matrix has rows this is `iso_c`.

    Cost: n + 3 eigendecompositions per matrix, of the shorter side.

    >>> import numpy as np
    >>> iso_cts(np.array([[[3, 0], [0, 0]], [[0, 0], [0, 1]]], np.float32), np.ones(2)).round(6).tolist()
    [[2.0, 0.0], [0.0, 2.0]]
    """
    if deltas.ndim == 2:
        return mean_delta(deltas, weights, lambda_)
    k, q = _sizes(min(deltas.shape[1:]), len(deltas), common_share)
    common = triplets(summed(deltas, weights), k)
    own = [_own_part(w * doubles(delta), common.u, q) for delta, w in zip(deltas, weights.tolist(), strict=True) if q]
    parts = [*own, common]
    s = np.concatenate([part.s for part in parts])
    if not len(s):
        return np.zeros(deltas.shape[1:], np.float32)
    u, vt = polar(np.hstack([part.u for part in parts])), polar(np.vstack([part.vt for part in parts]))
    merged: Floats = (lambda_ * s.mean() * (u @ vt)).astype(np.float32)
    return merged
