"""Decompose deltas over a common basis, renormalise, merge there as TIES does."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mediator_cli.kernels.arrays import Doubles, Floats
from mediator_cli.methods._matrix import Embeddings, doubles, floor_of, triplets
from mediator_cli.methods._ops import Lambda, kth_magnitudes, majority_block
from mediator_cli.methods.registry import merge_method
from mediator_cli.methods.statistics import Over, Params, Select, Slab, Sum, always, linear_maps, over_tensor

_LEAST = 0.01
"""Singular values at or below this share of the largest are dropped."""


def _kept(density: float, n: int) -> int:
    """Count the entries kept of n, as the authors do."""
    return n if density >= 1 else min(n, round(n * density) + 1)


def _vector_count(params: Params, n: int) -> int:
    return _kept(params["vector_density"], n)


def _over_model(params: Params) -> Over:
    return "model"


def _trims_vectors(params: Params) -> bool:
    return bool(params["vector_density"] < 1)


def _vectors(slab: Slab) -> Floats:
    """Give what is merged entry by entry: nothing of a matrix."""
    return slab.inputs if slab.inputs.ndim == 2 else slab.inputs.reshape(len(slab.inputs), -1)[:, :0]


def _vector_entries(slab: Slab) -> Doubles:
    return np.array([_vectors(slab).shape[1]], np.float64)


def _majority(slab: Slab) -> Doubles:
    return _majority_of(_vectors(slab), slab.statistics.get("thresholds"))


def _majority_of(vectors: Floats, thresholds: Floats | None) -> Doubles:
    n = len(vectors)
    return majority_block(vectors, np.zeros(n, np.float32) if thresholds is None else thresholds, np.ones(n))


def _sum(rows: NDArray[Any]) -> NDArray[Any]:
    """Add rows [n, ...] in recipe order, the same bits for any shape."""
    total: NDArray[Any] = np.zeros_like(rows[0])
    for row in rows:
        total += row
    return total


def _mean_of_changed(rows: NDArray[Any]) -> NDArray[Any]:
    """Average the entries of rows [n, ...] that are not zero."""
    mean: NDArray[Any] = _sum(rows) / np.maximum(np.count_nonzero(rows, axis=0), 1).astype(rows.dtype)
    return mean


def _elect(rows: NDArray[Any], weights: Doubles, majority: float | None = None) -> NDArray[Any]:
    """Keep the entries of rows [n, ...] that have the sign of their sum, weigh them, average those not zero.

    A sum of zero takes the sign of the majority, by default that of all these sums.
    """
    signs = np.sign(_sum(rows))
    signs[signs == 0] = np.sign(signs.sum(dtype=np.float64) if majority is None else majority)
    factors = weights.astype(rows.dtype).reshape(-1, *[1] * (rows.ndim - 1))
    return _mean_of_changed(np.where(np.sign(rows) == signs, rows * factors, rows.dtype.type(0)))


def _merge_in_common_basis(deltas: Doubles, weights: Doubles, density: float) -> Doubles:
    """Merge matrices [n, rows, columns] over their common left singular vectors."""
    n, rows, columns = deltas.shape
    u, s, vt = triplets(np.ascontiguousarray(deltas.transpose(1, 0, 2)).reshape(rows, -1), above=_LEAST)
    parts = np.ascontiguousarray(vt.reshape(len(s), n, columns).swapaxes(0, 1))
    norms = np.linalg.norm(parts, axis=2, keepdims=True)
    # An expert without a part in a direction has only rounding there, which must not be made a unit vector.
    norms[norms <= floor_of(1.0, (rows, n * columns))] = np.inf
    units = np.abs(parts) / norms
    k = _kept(density, units.size)
    limit = np.partition(units, units.size - k, axis=None)[units.size - k] if 0 < k < units.size else 0.0
    kept = np.where((units >= limit) & (units > 0), parts * s[:, None], 0.0)
    merged: Doubles = u @ _elect(kept, weights)
    return merged


def _working_bytes(n: int, rows: int, columns: int) -> int:
    """All deltas side by side, their parts in the common basis with temporaries, and one decomposition."""
    return 8 * (8 * n * rows * columns + 7 * max(rows, columns) ** 2)


@merge_method(
    space="delta",
    reference="https://arxiv.org/abs/2505.23117",
    view=linear_maps,
    working_bytes=_working_bytes,
    statistics=(
        Sum("vector_entries", _vector_entries, _over_model, _trims_vectors, whole=True),
        Select(
            "thresholds",
            _vector_count,
            _over_model,
            _trims_vectors,
            of=_vectors,
            among="vector_entries",
            whole=True,
        ),
        Sum("majority", _majority, over_tensor, always, whole=True),
    ),
)
def drm(
    deltas: Floats,
    weights: Doubles,
    *,
    direction: Annotated[
        Literal["horizontal", "vertical", "none"],
        Field(description="Basis common to the deltas side by side, or one below the other; none: just average."),
    ] = "horizontal",
    density: Annotated[
        float, Field(gt=0, le=1, description="Share of a matrix's entries in the common basis that stays.")
    ] = 0.2,
    vector_density: Annotated[
        float, Field(gt=0, le=1, description="Share of the entries of all that is no matrix that stays, per expert.")
    ] = 1.0,
    lambda_: Lambda = 1.0,
    embeddings: Embeddings = "average",
    vector_entries: Doubles | None = None,
    thresholds: Floats | None = None,
    majority: Doubles | None = None,
) -> Floats:
    """Write deltas over common singular vectors, trim and elect signs there, and go back.

    Entries at one place of two deltas need not mean the same; over common singular vectors they do.
    [τ₁ … τₙ] = U·S·[V₁ᵀ … Vₙᵀ] without singular values up to 1 % of the largest; rows of each Vₜᵀ are scaled to norm
    1 and the norm put beside S. The largest share `density` of all these entries, of all experts together, stays. An
    entry's sign is that of the sum over experts, a sum of zero takes the majority's; what agrees is multiplied by wₜ,
    and what is not zero is averaged. The result is λ·U·Y; `vertical` does the same with transposed matrices. All that
    is no matrix is trimmed over the model to `vector_density` and merged by the same election. Weights have no vote.

    Apt when experts disagree entry by entry although they do similar things in other coordinates.

    Not apt when one expert is much smaller than the others: renormalisation lets it decide on what is trimmed.

    Elsewhere: the authors' code at a drop rate of 0 averages changes that are not zero, without election: that is
    `direction: none`, here with weights. Its example uses the vertical direction, its default is the horizontal one.
    Parts of an expert that are nothing but rounding stay out here.

    Cost: one eigendecomposition per matrix, of the shorter side of all deltas stacked: rows when horizontal.

    >>> import numpy as np
    >>> drm(np.array([[[4, 0], [0, 0]], [[2, 0], [0, 0]]], np.float32), np.ones(2), density=1.0).round(6).tolist()
    [[3.0, 0.0], [0.0, 0.0]]
    """
    if deltas.ndim == 2:
        return _merge_vectors(deltas, weights, vector_density, lambda_, thresholds, majority)
    matrices = np.stack([doubles(delta.T if direction == "vertical" else delta) for delta in deltas])
    if direction == "none":
        merged = _mean_of_changed(matrices * weights[:, None, None])
    else:
        merged = _merge_in_common_basis(matrices, weights, density)
    return (lambda_ * (merged.T if direction == "vertical" else merged)).astype(np.float32)


def _merge_vectors(
    deltas: Floats,
    weights: Doubles,
    density: float,
    factor: float,
    thresholds: Floats | None,
    majority: Doubles | None,
) -> Floats:
    if thresholds is None and density < 1:
        thresholds = kth_magnitudes(deltas, _kept(density, deltas.shape[1]))
    votes = _majority_of(deltas, thresholds) if majority is None else majority
    kept = deltas if thresholds is None else np.where(np.abs(deltas) >= thresholds[:, None], deltas, np.float32(0))
    merged: Floats = _elect(kept, weights, float(votes[0])) * np.float32(factor)
    return merged
