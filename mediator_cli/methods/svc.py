"""Calibrate the singular values of a merge by what each expert does in their directions."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from mediator_cli.kernels.arrays import Doubles, Floats
from mediator_cli.methods._matrix import Embeddings, doubles, floor_of, summed, triplets
from mediator_cli.methods._ops import Lambda, Normalize, total_weight, weighted_sum
from mediator_cli.methods.registry import merge_method
from mediator_cli.methods.statistics import linear_maps


def _calibration(responses: Doubles, merged: Doubles, deltas: Floats, left: Doubles, alpha: float) -> Doubles:
    """Find the factor of each singular value [k]; `merged` are the rows that the merge has in each direction [k, c]."""
    total = np.zeros(len(merged))
    for delta in deltas:
        np.matmul(left.T, doubles(delta), out=responses)
        squares = np.einsum("kc,kc->k", responses, responses)
        along = np.einsum("kc,kc->k", responses, merged)
        # What is this small beside the delta's largest response is rounding, and no share of it means anything.
        is_there = squares > floor_of(1.0, delta.shape) ** 2 * squares.max(initial=0.0)
        total += np.maximum(alpha, np.divide(along, squares, out=np.zeros_like(along), where=is_there))
    factors: Doubles = len(deltas) / total
    return factors


def _working_bytes(n: int, rows: int, columns: int) -> int:
    """The merged delta, its vectors, one expert's delta and its rows in their directions, and a decomposition."""
    return 8 * (7 * rows * columns + 7 * min(rows, columns) ** 2)


@merge_method(
    space="delta",
    reference="https://arxiv.org/abs/2602.05536",
    view=linear_maps,
    working_bytes=_working_bytes,
    presets={"fusion_bench": {"lambda": 0.3, "normalize": False}},
    normalizes=lambda params: bool(params["normalize"]),
)
def svc(
    deltas: Floats,
    weights: Doubles,
    *,
    alpha: Annotated[
        float, Field(gt=0, allow_inf_nan=False, description="Least share of an expert's change that counts as kept.")
    ] = 0.1,
    lambda_: Lambda = 1.0,
    normalize: Normalize = True,
    embeddings: Embeddings = "average",
) -> Floats:
    """Merge by averaging or task arithmetic, then scale each singular value to what the experts meant.

    M = λ · Σ wₜ·τₜ / Σ wₜ = U·S·Vᵀ. In the direction of each left vector uᵣ the merge keeps the share
    sₜᵣ = <uᵣᵀM, uᵣᵀτₜ> / |uᵣᵀτₜ|² of expert t's change, and sᵣ is multiplied by n / Σₜ max(alpha, sₜᵣ): directions that
    several experts share are damped, those of one expert, which averaging has damped, are raised. Weights and λ decide
    on M alone; the experts are seen as they are. Where an expert has no change its share is 0. All that is no matrix
    is merged without calibration.

    Apt when several experts learned the same things, so that their sum exaggerates them.

    Not apt when the base is to stay dominant: whatever λ is, single experts' directions come back to full size as
    long as `alpha` allows it.

    Elsewhere: preset `fusion_bench` sums with λ = 0.3; `normalize` true is its variant after simple averaging. Both
    treat embeddings as matrices (`embeddings: matrix`).

    Cost: one eigendecomposition and n + 2 products per matrix.

    >>> import numpy as np
    >>> svc(np.array([[[2, 0], [0, 0]], [[0, 0], [0, 4]]], np.float32), np.ones(2), alpha=0.5).tolist()
    [[2.0, 0.0], [0.0, 4.0]]
    """
    divisor = total_weight(weights) if normalize else 1.0
    if deltas.ndim == 2:
        return weighted_sum(deltas, weights, divisor, lambda_)
    u, s, vt = triplets(summed(deltas, weights) * (lambda_ / divisor))
    rows = s[:, None] * vt
    factors = _calibration(np.empty_like(rows), rows, deltas, u, alpha)
    return ((u * factors) @ rows).astype(np.float32)
