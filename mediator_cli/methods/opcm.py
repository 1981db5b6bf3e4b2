"""Merge experts one after the other, each without what lies where the merged change is large already."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from mediator_cli.kernels.arrays import Doubles, Floats
from mediator_cli.methods._kernels import dot
from mediator_cli.methods._matrix import Embeddings, doubles, triplets
from mediator_cli.methods._ops import floats, weighted_sum
from mediator_cli.methods.registry import merge_method
from mediator_cli.methods.statistics import Over, Params, Slab, Sum, always, linear_maps


def _n_dominant(s: Doubles, alpha: float) -> int:
    """Count the singular values before the one with which their share of the sum exceeds alpha; 0 if none does."""
    return int(np.argmax(np.cumsum(s) / s.sum() > alpha))


def _cleaned(delta: Doubles, merged: Doubles, alpha: float, zero_diagonal: bool) -> Doubles:
    """Take from a delta [rows, columns] what lies in the dominant directions of what is merged so far.

    With B = Uᵀ · delta · V the block of the first r directions and, if asked for, the whole diagonal go.
    """
    u, s, vt = triplets(merged)
    if not len(s):
        return delta
    r, seen = _n_dominant(s, alpha), u.T @ delta
    cleaned = delta - u[:, :r] @ (seen[:r] @ vt[:r].T) @ vt[:r]
    if zero_diagonal:
        along = np.einsum("rc,rc->r", seen[r:], vt[r:])
        cleaned = cleaned - (u[:, r:] * along) @ vt[r:]
    return np.asarray(cleaned, np.float64)


def _accumulated(deltas: Floats, weights: Doubles, alpha: float, zero_diagonal: bool) -> Doubles:
    """Add up matrices [n, rows, columns], each cleaned of the sum before it; [rows, columns]."""
    merged = np.zeros(deltas.shape[1:])
    for delta, weight in zip(deltas, weights.tolist(), strict=True):
        merged += _cleaned(weight * doubles(delta), merged, alpha, zero_diagonal)
    return merged


def _squares(slab: Slab) -> Doubles:
    return _squares_of(slab.inputs, slab.weights, slab.params["alpha"], slab.params["zero_diagonal"])


def _squares_of(deltas: Floats, weights: Doubles, alpha: float, zero_diagonal: bool) -> Doubles:
    """Sum the squares of each weighed delta, and of what all come to before it is scaled; float64 [n + 1]."""
    rows = floats(deltas.reshape(len(deltas), deltas[0].size))
    each = [dot(row, row) * weight**2 for row, weight in zip(rows, weights, strict=True)]
    if deltas.ndim == 3:
        merged = floats(_accumulated(deltas, weights, alpha, zero_diagonal)).ravel()
    else:
        merged = weighted_sum(deltas, weights)
    return np.array([*each, dot(merged, merged)], np.float64)


def _over_model(params: Params) -> Over:
    return "model"


def _bytes(n: int, rows: int, columns: int) -> int:
    """A decomposition and some copies in float64."""
    return 8 * (9 * rows * columns + 8 * min(rows, columns) ** 2)


@merge_method(
    space="delta",
    reference="https://arxiv.org/abs/2501.09522",
    view=linear_maps,
    working_bytes=_bytes,
    statistics=(Sum("squares", _squares, _over_model, always, lambda n: (n + 1,), whole=True),),
    presets={"fusion_bench": {}, "official": {"zero_diagonal": False}},
    symmetric=False,
)
def opcm(
    deltas: Floats,
    weights: Doubles,
    *,
    alpha: Annotated[
        float, Field(ge=0, le=1, description="Share of the merged change's singular values that new changes avoid.")
    ] = 0.5,
    zero_diagonal: Annotated[
        bool, Field(description="Also avoid each pair of singular vectors of the merged change.")
    ] = True,
    embeddings: Embeddings = "average",
    squares: Doubles | None = None,
) -> Floats:
    """Add experts in recipe order, each without its part in the directions that earlier ones fill most.

    For each matrix S₁ = τ₁ and Sₖ = Sₖ₋₁ + U·B·Vᵀ with Sₖ₋₁ = U·D·Vᵀ and B = Uᵀ·τₖ·V, in which the block of the
    first r directions and the diagonal are set to zero. r counts the singular values before the one with which their
    share of the sum exceeds alpha; where none does no block is zero. Vectors, and by default embeddings, are added
    up. At last all is scaled so that the norm over the model is the mean of the experts' norms over the model.
    Deltas are multiplied by their weights first.

    Apt when experts arrive one by one or disagree in their main directions; the first ones keep most.

    Not apt when the order of the experts should not matter.

    Elsewhere: fusion_bench shuffles the experts, which a recipe does by their order. The authors' own repository
    means to zero the diagonal but leaves it as it is (preset `official`).

    Cost: n - 1 decompositions for each matrix, and once more over the model for the norm.

    >>> deltas = np.array([[[2, 0], [0, 1]], [[3, 4], [0, 0]]], np.float32)
    >>> opcm(deltas, np.ones(2), squares=np.array([1, 1, 1])).round(6).tolist()
    [[2.0, 4.0], [0.0, 1.0]]
    """
    if squares is None:
        squares = _squares_of(deltas, weights, alpha, zero_diagonal)
    norms = np.sqrt(squares)
    scale = float(norms[:-1].mean() / norms[-1]) if norms[-1] > 0 else 0.0
    if deltas.ndim == 2:
        return weighted_sum(deltas, weights, factor=scale)
    return np.asarray(_accumulated(deltas, weights, alpha, zero_diagonal) * scale, np.float32)
