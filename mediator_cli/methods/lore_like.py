"""Estimate a base and low-rank deltas from the experts alone, then merge these."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from mediator_cli.kernels.arrays import Doubles, Floats
from mediator_cli.methods._matrix import Embeddings, doubles, reshape_spectrum
from mediator_cli.methods._ops import Lambda, elect, total_weight, weighted_sum
from mediator_cli.methods.registry import merge_method
from mediator_cli.methods.statistics import linear_maps

_SETTLED = 1e-10
"""Estimates of the base that differ by less than this share of its largest entry count as equal."""


def _shrunk(matrix: Doubles, mu: float) -> Doubles:
    """Lower all singular values by mu, to zero at least."""
    return reshape_spectrum(matrix, lambda s: np.maximum(1 - mu / s, 0))


def _estimate(experts: Doubles, shares: Doubles, mu: float, iterations: int) -> tuple[Doubles, list[Doubles]]:
    """Find a base [rows, columns] and the deltas of n experts [n, rows, columns]; the base is what deltas leave."""
    mean = np.tensordot(shares, experts, 1)
    base, deltas = mean, [np.zeros_like(mean)] * len(experts)
    for _ in range(iterations):
        deltas = [_shrunk(expert - base, mu) for expert in experts]
        last, base = base, mean - sum(share * delta for share, delta in zip(shares, deltas, strict=True))
        if np.abs(base - last).max() <= _SETTLED * np.abs(base).max():
            break
    return base, deltas


def _working_bytes(n: int, rows: int, columns: int) -> int:
    """All experts and their deltas, the base twice, and one decomposition."""
    return 8 * ((3 * n + 8) * rows * columns + 7 * min(rows, columns) ** 2)


@merge_method(
    space="weight",
    reference="https://arxiv.org/abs/2502.10749",
    view=linear_maps,
    working_bytes=_working_bytes,
    normalizes=lambda params: True,
)
def lore_like(
    tensors: Floats,
    weights: Doubles,
    *,
    mu: Annotated[
        float, Field(ge=0, allow_inf_nan=False, description="How much singular values of the deltas are lowered.")
    ] = 0.01,
    iterations: Annotated[int, Field(ge=1, le=1000, description="Estimates of base and deltas, at most.")] = 20,
    merge: Annotated[
        Literal["elect", "mean", "sum"],
        Field(description="elect: mean of the entries of deltas with the elected sign; mean: of all; sum: Σ wₜ·δₜ."),
    ] = "elect",
    lambda_: Lambda = 1.0,
    embeddings: Embeddings = "average",
) -> Floats:
    """Estimate the base and low-rank deltas from the experts alone, then merge those deltas.

    In turns δₜ = the matrix Wₜ - W₀ with its singular values lowered by `mu`, to zero at least, and W₀ = the weighted
    mean of Wₜ - δₜ, beginning with the mean of the experts. The result is W₀ + λ · merge(δₜ). With `mean` and λ = 1
    that is the weighted mean of the experts, whatever `mu` is, and nothing is estimated. Signs are elected as in
    `ties`, without trimming. All that is no matrix becomes the weighted mean.

    Apt when the common base of the experts is not known.

    Not apt when it is known: then it need not be estimated. Nor with deltas whose singular values are all below `mu`,
    which vanish: the result is the mean.

    Uncertain: the paper's own `mu`, λ and iterations could not be read, and no code of the authors is public;
    defaults are a third party's. The paper's penalty, the squared nuclear norm, would lower singular values by an
    amount that depends on their sum; lowering by a constant is what its algorithm is said to do. The base given in
    the recipe is not looked at.

    Cost: iterations · n eigendecompositions per matrix, of the shorter side.

    >>> import numpy as np
    >>> experts = np.array([[[3, 0], [0, 1]], [[1, 0], [0, 1]]], np.float32)
    >>> lore_like(experts, np.ones(2), merge="sum", mu=0.5, iterations=1).tolist()
    [[2.0, 0.0], [0.0, 1.0]]
    """
    if tensors.ndim == 2 or (merge == "mean" and lambda_ == 1):
        flat = tensors.reshape(len(tensors), -1)
        return weighted_sum(flat, weights, total_weight(weights)).reshape(tensors.shape[1:])
    shares = weights / total_weight(weights)
    base, deltas = _estimate(np.stack([doubles(tensor) for tensor in tensors]), shares, mu, iterations)
    return (base + lambda_ * _merged(deltas, weights, shares, merge)).astype(np.float32)


def _merged(deltas: list[Doubles], weights: Doubles, shares: Doubles, merge: str) -> Doubles | Floats:
    if merge == "elect":
        rows = np.stack([delta.ravel() for delta in deltas]).astype(np.float32)
        return elect(rows, None, weights, weights).reshape(deltas[0].shape)
    merged: Doubles = np.tensordot(shares if merge == "mean" else weights, np.stack(deltas), 1)
    return merged
