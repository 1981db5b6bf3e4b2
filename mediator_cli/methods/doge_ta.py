"""Task arithmetic with one learned correction of all deltas."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from mediator_cli.kernels.arrays import Doubles, Floats
from mediator_cli.methods import _kernels_doge
from mediator_cli.methods._adam import descend
from mediator_cli.methods._matrix import Embeddings, doubles, summed, triplets
from mediator_cli.methods._ops import TrimDensity, TrimOver, floats, kth_magnitudes
from mediator_cli.methods._others import Others, merge_others
from mediator_cli.methods.registry import merge_method
from mediator_cli.methods.statistics import Over, Params, Select, Slab, Sum, linear_maps


def _flat(deltas: Floats) -> Floats:
    """Give the entries of matrices [n, rows, columns] in rows [n, m]; none of what is no matrix."""
    return deltas.reshape(len(deltas), -1) if deltas.ndim == 3 else deltas[:, :0]


def _flat_of(slab: Slab) -> Floats:
    return _flat(slab.inputs)


def _size(slab: Slab) -> Doubles:
    return np.array([_flat(slab.inputs).shape[1]], np.float64)


def _count(params: Params, n: int) -> int:
    return n if params["density"] >= 1 else int(n * params["density"]) + 1


def _spans_model(params: Params) -> bool:
    return bool(params["trim"] == "model" and params["density"] < 1)


def _over_model(params: Params) -> Over:
    return "model"


def _bytes(n: int, rows: int, columns: int) -> int:
    """A decomposition at a time in float64, the experts' leading directions, then Adam's state."""
    return (8 * 7 + 4 * 7) * rows * columns + 8 * 8 * min(rows, columns) ** 2


def _inverse_norms(deltas: Floats) -> Doubles:
    """Give 1 / ‖τ‖ for each of deltas [n, rows, columns], 0 for zero deltas."""
    norms = np.array([np.linalg.norm(doubles(delta)) for delta in deltas])
    return np.asarray(np.divide(1.0, norms, out=np.zeros(len(norms)), where=norms > 0))


def _shared(deltas: Floats, subspace: int) -> Floats:
    """Give an orthonormal basis of what the experts' output directions share most; [rows, r / subspace or fewer].

    Directions that are no more than rounding are none of an expert's.
    """
    least = min(deltas.shape[1:])
    joint = np.hstack([triplets(doubles(delta), least // len(deltas)).u for delta in deltas])
    return floats(triplets(joint, least // subspace).u)


def _correction(deltas: Floats, factors: Doubles, subspace: int, iterations: int, learning_rate: float) -> Floats:
    """Lower Σ ‖row sums of τ ⊙ (τ - Σ fᵢ·(τᵢ + Δ))‖² by Adam on Δ, from zero; float32 [rows, columns].

    Its gradient is -2s · Σ e ⊙ τ with e the row sums and s the sum of the factors [n], less its shared part.
    """
    near, total, merged = floats(deltas), float(factors.sum()), summed(deltas, factors)
    rest = floats([np.einsum("rc,rc->r", delta, doubles(delta) - merged) for delta in near])
    basis = _shared(near, subspace)
    rest, slope = rest * np.float32(-2 * total), np.float32(2 * total * total)

    def gradient(moved: Floats, out: Floats) -> None:
        _kernels_doge.reaction_gradient(near, moved, rest, slope, out)
        out -= basis @ (basis.T @ out)

    return descend(np.zeros(near.shape[1:], np.float32), gradient, iterations, learning_rate)


@merge_method(
    space="delta",
    reference="https://arxiv.org/abs/2501.01230",
    view=linear_maps,
    working_bytes=_bytes,
    statistics=(
        Sum("size", _size, _over_model, _spans_model, whole=True),
        Select("thresholds", _count, _over_model, _spans_model, of=_flat_of, among="size", whole=True),
    ),
    presets={"fusion_bench": {}},
)
def doge_ta(
    deltas: Floats,
    weights: Doubles,
    *,
    lambda_: Annotated[
        float, Field(allow_inf_nan=False, description="Norm that each delta of a matrix is given.")
    ] = 0.07,
    density: TrimDensity = 0.3,
    trim: TrimOver = "model",
    subspace: Annotated[int, Field(ge=1, description="One in so many directions is kept from correction.")] = 6,
    iterations: Annotated[int, Field(ge=0, description="Steps of Adam.")] = 400,
    learning_rate: Annotated[
        float, Field(gt=0, allow_inf_nan=False, description="About how far an entry moves in a step, at most.")
    ] = 1e-4,
    others: Others = "base",
    embeddings: Embeddings = "average",
    size: Doubles | None = None,
    thresholds: Floats | None = None,
) -> Floats:
    """Add one learned correction to all deltas, keep each delta's largest entries, sum with equal norms.

    For each matrix fᵢ = λ·wᵢ/‖τᵢ‖, and the result is Σ fᵢ·mᵢ ⊙ (τᵢ + Δ). mᵢ marks the largest share `density` of |τᵢ|
    over all matrices. Δ lowers Σ ‖row sums of τⱼ ⊙ (τⱼ - Σ fᵢ·(τᵢ + Δ))‖² by Adam, never along the output directions
    that the experts share: the leading r/`subspace` of their r/n leading ones each, r the smaller side. Zero deltas
    have no say. Vectors, and by default embeddings, stay the base's (`others`).

    Apt when many experts pull one layer in different directions with different strength.

    Not apt when deltas are of another size than those it was tuned for: λ fixes the norm of each delta of a matrix,
    and an entry of Δ moves by up to learning_rate · iterations, by default 0.04.

    Elsewhere: this is the data-free part of the authors' method as fusion_bench has it (preset `fusion_bench`).

    Cost: n + 1 decompositions for each matrix, then for each step one pass over the deltas and two products with the
    shared directions; once more over the model to find the largest entries.

    >>> deltas = np.array([[[4, 0], [0, 3]], [[0, 0], [0, 0]]], np.float32)
    >>> doge_ta(deltas, np.ones(2), lambda_=1.0, density=0.2, iterations=0).round(6).tolist()
    [[0.800000011920929, 0.0], [0.0, 0.0]]
    """
    if deltas.ndim == 2:
        return merge_others(deltas, weights, others)
    if thresholds is None:
        flat = _flat(deltas)
        thresholds = kth_magnitudes(flat, _count({"density": density}, flat.shape[1]))
    factors = lambda_ * weights * _inverse_norms(deltas)
    moved = _correction(deltas, factors, subspace, iterations, learning_rate)
    merged = np.zeros(moved.shape, np.float32)
    for delta, factor, threshold in zip(deltas, factors, thresholds, strict=True):
        if factor:
            merged += np.float32(factor) * np.where(abs(delta) >= threshold, delta + moved, np.float32(0))
    return merged
