"""Superpose the singular features of all experts so that each one's map is kept."""

from __future__ import annotations

from math import ceil
from typing import Annotated

import numpy as np
from pydantic import Field

from mediator_cli.kernels.arrays import Doubles, Floats
from mediator_cli.methods._matrix import Embeddings, Svd, doubles, mean_delta, triplets
from mediator_cli.methods._ops import Lambda
from mediator_cli.methods.registry import merge_method
from mediator_cli.methods.statistics import linear_maps


def _superpose(parts: list[Svd], ridge: float) -> Doubles:
    """Find M = Σ aᵢ·uᵢ·vᵢᵀ with uᵢᵀ·M·vᵢ = sᵢ for all features i, as nearly as ridge allows."""
    u, vt = np.hstack([part.u for part in parts]), np.vstack([part.vt for part in parts])
    s = np.concatenate([part.s for part in parts])
    gram = u.T @ u
    gram *= vt @ vt.T
    gram[np.diag_indices_from(gram)] += ridge
    return (u * np.linalg.solve(gram, s)) @ vt


def _working_bytes(n: int, rows: int, columns: int) -> int:
    """Features of all experts at full rank on both sides, and the system of equations with its factors."""
    short, long = sorted((rows, columns))
    return 8 * (3 * n * short * (short + long) + 4 * (n * short) ** 2 + 2 * rows * columns + 7 * short**2)


@merge_method(
    space="delta",
    reference="https://arxiv.org/abs/2502.10698",
    view=linear_maps,
    working_bytes=_working_bytes,
)
def stf_like(
    deltas: Floats,
    weights: Doubles,
    *,
    features: Annotated[
        float, Field(gt=0, le=1, description="Share of the rank: how many top singular triplets of each expert count.")
    ] = 1.0,
    ridge: Annotated[
        float, Field(ge=1e-9, le=1, description="How much experts that contradict each other are evened out.")
    ] = 1e-6,
    lambda_: Lambda = 1.0,
    embeddings: Embeddings = "average",
) -> Floats:
    """Find the matrix that answers to every expert's singular features as that expert does.

    Features of wₜ·τₜ are its top singular triplets (u, s, v). The merged delta is λ·M with M = Σ aᵢ·uᵢ·vᵢᵀ over the
    features of all experts and uᵢᵀ·M·vᵢ = sᵢ for each, which is the system (G + ridge·I)·a = s with
    Gᵢⱼ = <uᵢ, uⱼ>·<vᵢ, vⱼ>. Where experts contradict each other it gives the nearest answer of least norm. A feature
    that two experts share counts once, unlike in a sum. Singular values that rounding of float32 may have made are
    left out. All that is no matrix is averaged: λ · Σ wₜ·τₜ / n.

    Apt when experts share directions that a sum would count twice.

    Not apt when matrices are large: see the cost, and lower `features`.

    Uncertain: the paper's abstract speaks of this system; its formulas and code could not be read. The equations, the
    ridge and what happens to all that is no matrix are our reading.

    Cost: n eigendecompositions per matrix, and a system of n · features · rank equations, whose memory grows with its
    square and time with its cube.

    >>> import numpy as np
    >>> delta = np.array([[4, 0], [0, 2]], np.float32)
    >>> stf_like(np.stack([delta, delta]), np.ones(2)).round(4).tolist()
    [[4.0, 0.0], [0.0, 2.0]]
    """
    if deltas.ndim == 2:
        return mean_delta(deltas, weights, lambda_)
    most = ceil(features * min(deltas.shape[1:]))
    parts = [triplets(weight * doubles(delta), most) for delta, weight in zip(deltas, weights.tolist(), strict=True)]
    return (lambda_ * _superpose(parts, ridge)).astype(np.float32)
