"""Task singular vectors of clipped deltas, fewer for deltas that are sparse."""

from __future__ import annotations

from math import sqrt
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from mediator_cli.kernels.arrays import Doubles, Floats
from mediator_cli.methods._matrix import Embeddings, Svd, doubles, mean_delta, shared_rank, superpose, triplets
from mediator_cli.methods._ops import Lambda
from mediator_cli.methods.registry import merge_method
from mediator_cli.methods.statistics import linear_maps


def _clipped(delta: Doubles, sigmas: float) -> Doubles:
    limit = sigmas * sqrt(float(np.mean(delta**2)))
    return np.clip(delta, -limit, limit)


def _density(delta: Doubles) -> float:
    """Tell how evenly magnitudes are spread, after Hoyer: 1 where all are equal, 0 where one entry has it all."""
    norm, root = float(np.linalg.norm(delta)), sqrt(delta.size)
    return (float(np.abs(delta).sum()) / norm - 1) / (root - 1) if norm and root > 1 else 1.0


def _part(delta: Doubles, sigmas: float, most: int, by_density: bool) -> Svd:
    clipped = _clipped(delta, sigmas)
    return triplets(clipped, max(1, round(_density(clipped) * most)) if by_density else most)


def _working_bytes(n: int, rows: int, columns: int) -> int:
    """Vectors of all experts on both sides, their polar factors, and one clipped delta with its decomposition."""
    short, long = sorted((rows, columns))
    return 8 * (4 * max(short, n) * (short + long) + 5 * rows * columns + 7 * max(short, n) * short)


@merge_method(
    space="delta",
    reference="https://arxiv.org/abs/2502.06876",
    view=linear_maps,
    working_bytes=_working_bytes,
)
def r_tsvm_like(
    deltas: Floats,
    weights: Doubles,
    *,
    sigmas: Annotated[
        float,
        Field(gt=0, allow_inf_nan=False, description="Clip a delta's entries at so many times their root mean square."),
    ] = 3.0,
    rank: Annotated[
        Literal["sparsity", "shared"],
        Field(description="Lower an expert's part of the rank by the sparsity of its delta, or leave it as in tsv_m."),
    ] = "sparsity",
    lambda_: Lambda = 1.0,
    embeddings: Embeddings = "average",
) -> Floats:
    """Merge as `tsv_m` does, with outliers clipped and lower ranks for sparse deltas.

    Entries of wₜ·τₜ beyond `sigmas` root mean squares are set to that limit. Of the min(rows, columns) // n singular
    triplets that `tsv_m` would keep, the share dₜ stays, at least one, where dₜ = (L1/L2 - 1)/(√N - 1) of the N
    clipped entries: about 0.8 for normally distributed ones, 0 for a single one. The rest is `tsv_m`: vectors of all
    experts become orthogonal, vectors and excluded matrices are averaged.

    Apt when a few extreme changes, or many small ones, keep `tsv_m` from finding the directions that matter.

    Not apt when outliers are what the experts learned.

    Uncertain: the paper (RESM, R-TSVM) names outlier-aware weights and a rank that follows the layer's sparsity; its
    formulas could not be read and no code is public. Clipping as weight of an outlier, and Hoyer's measure of sparsity,
    are our reading.

    Cost: n + 2 eigendecompositions per matrix, of the shorter side.

    >>> import numpy as np
    >>> deltas = np.array([[[2, 0], [0, 0]], [[0, 0], [0, 4]]], np.float32)
    >>> r_tsvm_like(deltas, np.ones(2), sigmas=1.0).tolist()
    [[1.0, 0.0], [0.0, 2.0]]
    """
    if deltas.ndim == 2:
        return mean_delta(deltas, weights, lambda_)
    most = shared_rank(deltas.shape[1:], len(deltas))
    scaled = (weight * doubles(delta) for delta, weight in zip(deltas, weights.tolist(), strict=True))
    parts = [_part(delta, sigmas, most, rank == "sparsity") for delta in scaled]
    return (lambda_ * superpose(parts, decorrelate=True)).astype(np.float32)
