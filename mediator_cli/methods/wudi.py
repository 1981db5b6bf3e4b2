"""Keep the merged change from reacting to the experts' own inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import sqrt
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from mediator_cli.kernels.arrays import Doubles, Floats
from mediator_cli.methods._adam import descend
from mediator_cli.methods._matrix import Embeddings, eigh, floor_of, weighted_matrices
from mediator_cli.methods._ops import floats
from mediator_cli.methods._others import Others, merge_others
from mediator_cli.methods.registry import merge_method
from mediator_cli.methods.statistics import linear_maps


def _bytes(n: int, rows: int, columns: int) -> int:
    """Deltas and sums in float64, Adam's state, C with what its eigenvalues take."""
    return (8 * (n + 5) + 20) * rows * columns + 8 * 8 * columns**2


def _size_of(deltas: Sequence[Doubles]) -> float:
    """Give the root mean square of all entries of deltas [rows, columns]."""
    return sqrt(sum(float(np.vdot(delta, delta)) for delta in deltas) / (len(deltas) * deltas[0].size))


def _curvature(deltas: Sequence[Doubles]) -> Doubles:
    """Sum τᵀτ / ‖τ‖² over deltas [rows, columns]; [columns, columns]. Zero deltas add nothing."""
    total = np.zeros((deltas[0].shape[1], deltas[0].shape[1]))
    for delta in deltas:
        square = np.vdot(delta, delta)
        if square > 0:
            total += delta.T @ delta / square
    return total


def _target(deltas: Sequence[Doubles]) -> Doubles:
    """Sum τ·τᵀτ / ‖τ‖² over deltas [rows, columns]; [rows, columns]."""
    total = np.zeros_like(deltas[0])
    for delta in deltas:
        square = np.vdot(delta, delta)
        if square > 0:
            total += delta @ (delta.T @ delta) / square
    return total


def _spectrum(curvature: Doubles) -> tuple[Doubles, Doubles]:
    """Give the eigenvalues [r] and vectors [columns, r] of C, without those that rounding of float32 entries leaves."""
    values, vectors = eigh(curvature)
    roots = np.sqrt(values)
    rank = int(np.count_nonzero(roots > floor_of(float(roots[0]), curvature.shape)))
    return values[:rank], vectors[:, :rank]


def _times(curvature: Doubles) -> Callable[[Floats, Floats], object]:
    """Write a matrix times C to another, in float32; by two thin factors of C where that is less work."""
    values, vectors = _spectrum(curvature)
    if 2 * len(values) >= len(curvature):
        whole = floats(curvature)
        return lambda matrix, out: np.matmul(matrix, whole, out=out)
    thin = floats(vectors * np.sqrt(values))
    back = floats(thin.T)
    return lambda matrix, out: np.matmul(matrix @ thin, back, out=out)


def _descended(deltas: Sequence[Doubles], iterations: int, learning_rate: float) -> Doubles:
    """Start at the sum of deltas [rows, columns] and go down the gradient 2·(M·C - R) of the loss."""
    start, curvature = np.asarray(sum(deltas)), 2 * _curvature(deltas)
    # Of the gradient only what the steps change goes through float32.
    at_start, times_curvature = floats(start @ curvature - 2 * _target(deltas)), _times(curvature)

    def gradient(moved: Floats, out: Floats) -> None:
        times_curvature(moved, out)
        out += at_start

    return np.asarray(start + descend(np.zeros_like(at_start), gradient, iterations, learning_rate), np.float64)


def _least(deltas: Sequence[Doubles]) -> Doubles:
    """Minimise the loss: R·C⁺."""
    values, basis = _spectrum(_curvature(deltas))
    return np.asarray((_target(deltas) @ basis / values) @ basis.T, np.float64)


@merge_method(
    space="delta",
    reference="https://arxiv.org/abs/2503.08099",
    view=linear_maps,
    working_bytes=_bytes,
    presets={"fusion_bench": {"iterations": 400, "others": "mean", "embeddings": "matrix"}},
)
def wudi(
    deltas: Floats,
    weights: Doubles,
    *,
    iterations: Annotated[int, Field(ge=0, description="Steps of Adam.")] = 300,
    learning_rate: Annotated[
        float, Field(gt=0, allow_inf_nan=False, description="About how far an entry moves in a step, at most.")
    ] = 1e-5,
    unit: Annotated[
        Literal["one", "rms"],
        Field(description="What the learning rate counts in: 1, or the root mean square of all deltas' entries."),
    ] = "one",
    solve: Annotated[
        Literal["adam", "exact"], Field(description="Take the steps, or go to the minimum itself at once.")
    ] = "adam",
    others: Others = "base",
    embeddings: Embeddings = "average",
) -> Floats:
    """Change the sum of the deltas until it differs little from each where that expert's inputs lie.

    The rows of a delta τᵢ span about the inputs that its layer was trained on, so no data is needed. For each matrix
    M = Σ wᵢ·τᵢ is the start, and Adam lowers the loss Σ ‖(M - τᵢ)·τᵢᵀ‖² / ‖τᵢ‖². Vectors, and by default
    embeddings, stay the base's (`others`).

    Apt when experts are trained on different tasks with full matrices: interference is removed layer by layer.

    Not apt when deltas are of another size than those that the learning rate was chosen for: an entry moves by up to
    learning_rate · iterations, by default 0.003, which is more than many language models' deltas. Then `unit: rms`
    makes the learning rate a share of the deltas' size, 0.01 or so. `solve: exact` is the minimum R·C⁺ with
    C = Σ τᵢᵀτᵢ / ‖τᵢ‖² and R = Σ τᵢ·τᵢᵀτᵢ / ‖τᵢ‖²; few steps regularise and are said to do better.

    Elsewhere: fusion_bench merges all matrices, averages all vectors and takes 400 steps (preset `fusion_bench`).

    Cost: one product [rows, columns] · [columns, columns] in float32 for each step, whatever the number of experts;
    much less where all deltas together are of low rank. One eigendecomposition of a square matrix as wide.

    >>> deltas = np.array([[[2, 0], [0, 0]], [[0, 0], [0, 1]]], np.float32)
    >>> wudi(deltas, np.ones(2)).tolist()
    [[2.0, 0.0], [0.0, 1.0]]
    """
    if deltas.ndim == 2:
        return merge_others(deltas, weights, others)
    size = _size_of(weighted_matrices(deltas, weights))
    if size == 0:
        return np.zeros(deltas.shape[1:], np.float32)
    scale = size if unit == "rms" else 1.0
    scaled = weighted_matrices(deltas, weights / scale)
    merged = _least(scaled) if solve == "exact" else _descended(scaled, iterations, learning_rate)
    return np.asarray(merged * scale, np.float32)
