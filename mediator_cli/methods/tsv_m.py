"""Merge task singular vectors: the top directions of each expert, made orthogonal."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from mediator_cli.kernels.arrays import Doubles, Floats
from mediator_cli.methods._matrix import Embeddings, doubles, mean_delta, shared_rank, superpose, triplets
from mediator_cli.methods._ops import Lambda, weighted_sum
from mediator_cli.methods.registry import merge_method
from mediator_cli.methods.statistics import linear_maps


def _working_bytes(n: int, rows: int, columns: int) -> int:
    """Vectors of all experts at full rank on both sides, their polar factors, and one decomposition."""
    short, long = sorted((rows, columns))
    return 8 * (4 * n * short * (short + long) + 4 * rows * columns + 7 * short * long)


@merge_method(
    space="delta",
    reference="https://arxiv.org/abs/2412.00081",
    view=linear_maps,
    working_bytes=_working_bytes,
    identity_at_one=True,
)
def tsv_m(
    deltas: Floats,
    weights: Doubles,
    *,
    rank: Annotated[
        Literal["shared", "full"],
        Field(description="Each expert's singular triplets: its part of the rank, min(rows, columns) // n, or all."),
    ] = "shared",
    decorrelate: Annotated[
        bool, Field(description="Replace all vectors of a side by the nearest orthonormal ones, or just add up.")
    ] = True,
    lambda_: Lambda = 1.0,
    embeddings: Embeddings = "average",
) -> Floats:
    """Give each expert an equal part of the rank and make the singular vectors of all orthogonal.

    wₜ·τₜ = Uₜ·Sₜ·Vₜᵀ, cut to the top min(rows, columns) // n triplets, one at least. U = [U₁ … Uₙ] becomes the nearest
    matrix with orthonormal columns, so does V, and the result is λ·U·diag(S)·Vᵀ. Singular values that rounding of
    float32 may have made are left out, and so are directions that vectors of several experts do not have. All that is
    no matrix is averaged: λ · Σ wₜ·τₜ / n.

    Apt when experts change the same matrices in different directions of low rank. λ = 1 is a good first choice.

    Not apt when each expert needs more than its part of the rank, as with many experts on small matrices.

    Elsewhere: the authors and fusion_bench treat embeddings as matrices (`embeddings: matrix`). `rank: full` is the
    authors' lossless variant, `decorrelate: false` their plain sum of low ranks; their variant by eigenvalues is the
    same up to rounding. fusion_bench's list of alphas are the recipe's weights.

    Cost: n + 2 eigendecompositions per matrix, of the shorter side.

    >>> import numpy as np
    >>> tsv_m(np.array([[[3, 0], [0, 1]], [[0, 0], [0, 2]]], np.float32), np.ones(2)).tolist()
    [[3.0, 0.0], [0.0, 2.0]]
    """
    if deltas.ndim == 2:
        return mean_delta(deltas, weights, lambda_)
    if len(deltas) == 1:
        # Nothing is cut, and the vectors are orthonormal as they are.
        return weighted_sum(deltas.reshape(1, -1), weights, factor=lambda_).reshape(deltas.shape[1:])
    most = shared_rank(deltas.shape[1:], len(deltas)) if rank == "shared" else None
    parts = [triplets(weight * doubles(delta), most) for delta, weight in zip(deltas, weights.tolist(), strict=True)]
    return (lambda_ * superpose(parts, decorrelate=decorrelate)).astype(np.float32)
