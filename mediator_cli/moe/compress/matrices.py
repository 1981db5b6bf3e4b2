"""The three matrices of an expert, and the mean of several experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from mediator_cli.checkpoint.moe_layout import Projection
    from mediator_cli.kernels.arrays import Counts, Doubles, Floats


@dataclass(frozen=True)
class Matrices:
    """The matrices of one expert with a row for each inner neuron: gate, up, and down transposed; [inner, hidden]."""

    gate: Floats
    up: Floats
    down_t: Floats

    @property
    def rows(self) -> tuple[Floats, Floats, Floats]:
        """All three."""
        return self.gate, self.up, self.down_t


def weighted_mean(
    matrices: Iterable[Floats], weights: Sequence[float], orders: Sequence[Counts | None], projection: Projection
) -> Doubles:
    """Sum the same matrix of some experts with coefficients, in float64, after putting inner neurons in order.

    Inner neurons are rows of gate and up, columns of down.
    """
    axis = 1 if projection == "down_proj" else 0
    found: Doubles = np.zeros(())
    for matrix, weight, order in zip(matrices, weights, orders, strict=True):
        ordered = matrix if order is None else matrix.take(order, axis=axis)
        found = found + weight * ordered.astype(np.float64)
    return found


def project(mean: Doubles, matrices: Iterable[Floats], share: float) -> Doubles:
    """Project a mean [out, in] on the leading left singular vectors of its members side by side [W_1 … W_n].

    As many as make up `share` of min(out, n · in), rounded up. From [W_1 … W_n] = U Σ [V_1ᵀ … V_nᵀ] follows
    U_r Σ_r (Σ w_i V_i,r)ᵀ = U_r U_rᵀ Σ w_i W_i, so V is never made; U are the eigenvectors of Σ W_i W_iᵀ.
    """
    squares, n = np.zeros((len(mean), len(mean))), 0
    for matrix in matrices:
        wide = matrix.astype(np.float64)
        squares += wide @ wide.T
        n += 1
    kept = max(1, int(np.ceil(share * min(mean.shape[0], n * mean.shape[1]))))
    leading = np.linalg.eigh(squares)[1][:, -kept:]
    found: Doubles = leading @ (leading.T @ mean)
    return found
