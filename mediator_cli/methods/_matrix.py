"""Steps of methods that work on whole matrices, in float64: LAPACK in float32 loses the small singular values.

A singular value that rounding of float32 entries may have made counts as zero, so that no direction is a matter of
chance: see `floor_of`. Nothing here looks at more than one matrix.
"""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mediator_cli.errors import MediatorError, Problem
from mediator_cli.kernels.arrays import Doubles, Floats
from mediator_cli.methods._ops import weighted_sum

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Embeddings = Annotated[
    Literal["average", "matrix"],
    Field(description="What has a row per token is averaged as vectors are, or merged as matrices are."),
]

_SMALL = 1e-3
"""A singular value below this share of the largest is found anew: rounding of the Gram matrix comes near its square."""


class Svd(NamedTuple):
    """u [rows, r], s [r] falling, vt [r, columns], with matrix = u · diag(s) · vt."""

    u: Doubles
    s: Doubles
    vt: Doubles


def doubles(matrix: NDArray[Any]) -> Doubles:
    """Copy to float64, row after row: a product's last bit depends on how its factors lie in memory."""
    return np.array(matrix, np.float64, order="C")


def svd(matrix: Floats | Doubles) -> Svd:
    """Take a matrix apart into all min(rows, columns) singular triplets, by LAPACK's divide and conquer in float64."""
    whole = doubles(matrix)
    found = _first_that_converges(
        whole.shape,
        lambda: np.linalg.svd(whole, full_matrices=False),
        lambda: _turned(*np.linalg.svd(whole.T, full_matrices=False)),
    )
    return Svd(*found)


def _turned(u: Doubles, s: Doubles, vt: Doubles) -> Svd:
    return Svd(vt.T, s, u.T)


def eigh(gram: Doubles) -> tuple[Doubles, Doubles]:
    """Take a Gram matrix [r, r] apart: eigenvalues [r] falling, none below zero, and eigenvectors [r, r] as columns."""
    values, vectors = _first_that_converges(gram.shape, lambda: np.linalg.eigh(gram), lambda: _eigh_by_svd(gram))
    return np.maximum(values[::-1], 0), np.ascontiguousarray(vectors[:, ::-1])


def _eigh_by_svd(gram: Doubles) -> tuple[Doubles, Doubles]:
    u, s, _ = np.linalg.svd(gram)
    return s[::-1], u[:, ::-1]


def _first_that_converges(shape: tuple[int, ...], *ways: Callable[[], Any]) -> Any:  # noqa: ANN401 - what the ways give
    for way in ways:
        try:
            return way()
        except np.linalg.LinAlgError:
            continue
    size = " x ".join(map(str, shape))
    hint = "look for extreme values in the experts' matrices of that shape, or take a method that merges single entries"
    raise MediatorError(Problem("", f"the singular values of a matrix of {size} could not be found", hint))


def floor_of(scale: float, shape: tuple[int, ...]) -> float:
    """Give what rounding of float32 entries can make of a singular value 0: eps · √(longer side) · the largest.

    Noise of independent entries has no singular value above about 2·√(longer side) times their size, and an entry's
    rounding error is at most eps / 2 times the largest singular value.
    """
    return float(np.finfo(np.float32).eps) * sqrt(max(shape)) * scale


def rank_of(s: Doubles, shape: tuple[int, ...], scale: float | None = None) -> int:
    """Count falling singular values above `floor_of`; `scale` is the largest of the matrix they are compared with."""
    largest = float(s[0]) if len(s) else 0.0
    return int(np.count_nonzero(s > floor_of(largest if scale is None else scale, shape)))


class Spectrum(NamedTuple):
    """Singular values s [k] falling, above rounding, and vectors [side, k] on the shorter side of a matrix.

    These are the right ones if the matrix is `tall` (no fewer rows than columns), else the left ones.
    """

    s: Doubles
    vectors: Doubles
    tall: bool


def spectrum(matrix: Doubles, most: int | None = None, scale: float | None = None, above: float = 0.0) -> Spectrum:
    """Find the singular values above rounding, at most so many, and the vectors on the shorter side.

    `scale` is as in `rank_of`; `above` asks for a larger share of the largest singular value. By eigenvalues of the
    Gram matrix of the shorter side, 1.5 to 3 times faster than `svd`. Small singular values are found anew where the
    matrix is seen from their vectors alone, which leaves errors of about 1e-10 of the matrix.
    """
    tall = matrix.shape[0] >= matrix.shape[1]
    rows = matrix if tall else matrix.T
    squares, vectors = eigh(rows.T @ rows)
    s = np.sqrt(squares)
    largest = float(s[0]) if len(s) else 0.0
    floor = max(floor_of(largest if scale is None else scale, matrix.shape), above * largest)
    first, last = int(np.count_nonzero(s >= _SMALL * largest)), int(np.count_nonzero(s > floor / 2))
    if first < min(last, len(s) if most is None else most):
        part = rows @ vectors[:, first:last]
        squares, turn = eigh(part.T @ part)
        s[first:last], vectors[:, first:last] = np.sqrt(squares), vectors[:, first:last] @ turn
    k = min(int(np.count_nonzero(s[:last] > floor)), len(s) if most is None else most)
    return Spectrum(s[:k], np.ascontiguousarray(vectors[:, :k]), tall)


def triplets(matrix: Doubles, most: int | None = None, scale: float | None = None, above: float = 0.0) -> Svd:
    """Take a matrix apart into its singular triplets above rounding, or fewer: see `spectrum`. Faster than `svd`."""
    s, vectors, tall = spectrum(matrix, most, scale, above)
    if tall:
        return Svd((matrix @ vectors) / s, s, np.ascontiguousarray(vectors.T))
    return Svd(vectors, s, (vectors.T @ matrix) / s[:, None])


def reshape_spectrum(matrix: Doubles, factors: Callable[[Doubles], Doubles]) -> Doubles:
    """Multiply each singular value above rounding by a factor, given them [k]; the others become zero."""
    s, vectors, tall = spectrum(matrix)
    middle = (vectors * factors(s)) @ vectors.T
    return matrix @ middle if tall else middle @ matrix


def polar(matrix: Doubles) -> Doubles:
    """Give the nearest matrix with orthonormal columns or rows: P·Qᵀ of matrix = P·D·Qᵀ.

    Where the rank is lower, only the directions that the matrix has: others would be a matter of chance.
    """
    return reshape_spectrum(matrix, lambda s: 1 / s)


def weighted_matrices(deltas: Floats, weights: Doubles) -> list[Doubles]:
    """Multiply matrices [n, rows, columns] by their weights [n], in float64."""
    return [weight * doubles(delta) for delta, weight in zip(deltas, weights.tolist(), strict=True)]


def summed(deltas: Floats, weights: Doubles) -> Doubles:
    """Sum weights [n] · matrices [n, rows, columns] in recipe order, in float64."""
    total = np.zeros(deltas.shape[1:], np.float64)
    for delta, weight in zip(deltas, weights.tolist(), strict=True):
        total += weight * doubles(delta)
    return total


def mean_delta(deltas: Floats, weights: Doubles, factor: float) -> Floats:
    """Average weights [n] · deltas [n, m] over their number, as spectral methods do with all that is no matrix."""
    return weighted_sum(deltas, weights, len(deltas), factor)


def superpose(parts: Sequence[Svd], *, decorrelate: bool) -> Doubles:
    """Sum singular triplets of several matrices; first let their vectors keep out of each other's way if told so.

    All left vectors side by side are replaced by the nearest orthonormal ones, and so are all right vectors.
    """
    u, vt = np.hstack([part.u for part in parts]), np.vstack([part.vt for part in parts])
    s = np.concatenate([part.s for part in parts])
    if decorrelate and len(s):
        u, vt = polar(u), polar(vt)
    total: Doubles = (u * s) @ vt
    return total


def shared_rank(shape: tuple[int, ...], n: int) -> int:
    """Give each of n experts its part of the rank of a matrix; one at least, even if they are more than the rank."""
    return max(1, min(shape) // n)
