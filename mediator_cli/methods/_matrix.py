"""Steps of methods that work on whole matrices, in float64: LAPACK in float32 loses the small singular values."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mediator_cli.kernels.arrays import Doubles, Floats


class Svd(NamedTuple):
    """u [rows, r], s [r] falling, vt [r, columns], with matrix = u · diag(s) · vt."""

    u: Doubles
    s: Doubles
    vt: Doubles


def svd(matrix: Floats | Doubles) -> Svd:
    """Take a matrix apart into min(rows, columns) singular triplets, in float64."""
    return Svd(*np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False))


def rank_of(s: Doubles, shape: tuple[int, ...]) -> int:
    """Count singular values above what rounding of float32 entries leaves: eps · max(shape) · the largest."""
    floor = np.finfo(np.float32).eps * max(shape) * (s[0] if len(s) else 0.0)
    return int(np.count_nonzero(s > floor))


def polar(matrix: Doubles) -> Doubles:
    """Give the nearest matrix with orthonormal columns or rows: P·Qᵀ of matrix = P·D·Qᵀ."""
    u, _, vt = svd(matrix)
    return u @ vt
