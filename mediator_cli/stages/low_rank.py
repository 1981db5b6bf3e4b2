"""The nearest matrix of low rank: by a random sketch where that is much less work than all singular values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mediator_cli.methods._matrix import Svd, rank_of, triplets

if TYPE_CHECKING:
    from collections.abc import Callable

    from mediator_cli.kernels.arrays import Doubles, Floats

_OVERSAMPLED = 10
"""Directions that are looked at beyond those wanted."""
_ITERATIONS = 3
"""Turns of power iteration: each draws the sketch nearer to the largest directions."""
_EXACT_BELOW = 4
"""All singular values are found where a sketch would have more than this part, one in so many, of the directions."""
_FIRST = 32
_STEP = 1 << 20
"""Elements that are widened to float64 at a time."""


@dataclass(frozen=True)
class LowRank:
    """Singular triplets of a matrix, the largest; `total` is the sum of all its squares."""

    found: Svd
    total: float

    @property
    def rank(self) -> int:
        """Number of triplets."""
        return len(self.found.s)

    @property
    def energy(self) -> float:
        """Share of the squares that they hold: 1 - |matrix - u·s·vt|² / |matrix|²; 1 for a zero matrix."""
        return min(1.0, float(np.square(self.found.s).sum()) / self.total) if self.total else 1.0


def find_low_rank(matrix: Floats, rank: int, energy: float, uniforms: Callable[[tuple[int, int]], Floats]) -> LowRank:
    """Find the largest singular triplets of a matrix [rows, columns]: at most `rank` of them, no limit if that is 0.

    Of these the fewest that hold a share `energy` of all squares. `uniforms` gives random numbers in [0, 1) of a shape;
    the same numbers give the same bits. A sketch with power iterations (Halko, Martinsson and Tropp, SIAM Review 2011),
    in float64; what it holds is what it says, the best possible is a little more.
    """
    total = _squares(matrix)
    if not total:
        return LowRank(Svd(np.zeros((matrix.shape[0], 0)), np.zeros(0), np.zeros((0, matrix.shape[1]))), 0.0)
    most = min(matrix.shape)
    wanted = min(rank or _FIRST, most)
    while True:
        found = _largest(matrix, wanted, uniforms)
        held = np.cumsum(np.square(found.s[:wanted]))
        if rank or wanted == most or len(held) < wanted or held[-1] >= energy * total:
            break
        wanted = min(2 * wanted, most)
    kept = min(len(held), int(np.searchsorted(held, energy * total)) + 1) if energy < 1 else len(held)
    return LowRank(Svd(found.u[:, :kept], found.s[:kept], found.vt[:kept]), total)


def _largest(matrix: Floats, wanted: int, uniforms: Callable[[tuple[int, int]], Floats]) -> Svd:
    size = wanted + _OVERSAMPLED
    if size * _EXACT_BELOW > min(matrix.shape):
        return triplets(matrix.astype(np.float64), wanted)
    basis = _orthonormal(_times(matrix, uniforms((matrix.shape[1], size)) - 0.5))
    for _ in range(_ITERATIONS):
        basis = _orthonormal(_times(matrix, _orthonormal(_turned_times(matrix, basis))))
    u, s, vt = np.linalg.svd(_turned_times(matrix, basis).T, full_matrices=False)
    there = rank_of(s, matrix.shape)
    return Svd(basis @ u[:, :there], s[:there], vt[:there])


def _orthonormal(columns: Doubles) -> Doubles:
    return np.linalg.qr(columns)[0]


def _rows(matrix: Floats) -> list[slice]:
    step = max(1, _STEP // matrix.shape[1])
    return [slice(first, first + step) for first in range(0, matrix.shape[0], step)]


def _squares(matrix: Floats) -> float:
    return sum(float(np.square(matrix[rows], dtype=np.float64).sum()) for rows in _rows(matrix))


def _times(matrix: Floats, columns: Doubles | Floats) -> Doubles:
    """Multiply matrix · columns in float64, some rows at a time."""
    wide = columns.astype(np.float64)
    return np.concatenate([matrix[rows].astype(np.float64) @ wide for rows in _rows(matrix)])


def _turned_times(matrix: Floats, columns: Doubles) -> Doubles:
    """Multiply matrixᵀ · columns in float64, some rows at a time."""
    total = np.zeros((matrix.shape[1], columns.shape[1]))
    for rows in _rows(matrix):
        total += matrix[rows].astype(np.float64).T @ columns[rows]
    return total
