"""Products of two small factors, added to where they belong without ever being stored.

An entry is summed term by term in float64 in the order of the rank, whichever way a call cuts the product, so that its
bits depend on nothing but the factors. Two rows and four terms at a time spare most loads and stores.
"""

from __future__ import annotations

import numpy as np

from mediator_cli.kernels.arrays import Doubles, Floats
from mediator_cli.kernels.jit import kernel

TILE = 1024


@kernel
def add_product(left: Doubles, right: Floats | Doubles, scale: float, first: int, out: Floats | Doubles) -> None:
    """Add entries `first` on of the flattened scale · left · right, each rounded to the dtype of `out`, to `out` [m].

    left [rows, rank] and right [rank, columns] are in C order, with rows enough for all of `out`.
    """
    columns, sums = right.shape[1], np.empty((2, TILE), np.float64)
    for column in range(0, columns, TILE):
        row = 0
        while row < left.shape[0]:
            row += _add_tiles(left[row:], right, scale, column, row * columns + column - first, out, sums)


@kernel
def _add_tiles(
    left: Doubles, right: Floats | Doubles, scale: float, column: int, low: int, out: Floats | Doubles, sums: Doubles
) -> int:
    """Add a tile of the first two rows if `out` has all of both, else what it has of the first; return how many rows.

    The first row's tile begins at `column` of the row and at `low` of `out`, which may be below 0.
    """
    columns, size = right.shape[1], out.shape[0]
    high = low + min(TILE, columns - column)
    if left.shape[0] > 1 and low >= 0 and high + columns <= size:
        p, q = sums[0, : high - low], sums[1, : high - low]
        _sum_two(left[0], left[1], right, column, p, q)
        _add_scaled(p, scale, out[low:high])
        _add_scaled(q, scale, out[low + columns : high + columns])
        return 2
    begin, end = max(low, 0), min(high, size)
    if begin < end:
        p = sums[0, : end - begin]
        _sum_one(left[0], right, column + begin - low, p)
        _add_scaled(p, scale, out[begin:end])
    return 1


@kernel
def _sum_two(a: Doubles, b: Doubles, right: Floats | Doubles, column: int, p: Doubles, q: Doubles) -> None:
    """Fill p and q [m] with the entries of the rows a and b [rank] times `right` from a column on."""
    m, rank = p.shape[0], right.shape[0]
    p[:], q[:] = 0.0, 0.0
    for k in range(0, rank - 3, 4):
        a0, a1, a2, a3 = a[k], a[k + 1], a[k + 2], a[k + 3]
        b0, b1, b2, b3 = b[k], b[k + 1], b[k + 2], b[k + 3]
        r0, r1 = right[k, column : column + m], right[k + 1, column : column + m]
        r2, r3 = right[k + 2, column : column + m], right[k + 3, column : column + m]
        for j in range(m):
            w, x, y, z = r0[j], r1[j], r2[j], r3[j]
            p[j] = (((p[j] + a0 * w) + a1 * x) + a2 * y) + a3 * z
            q[j] = (((q[j] + b0 * w) + b1 * x) + b2 * y) + b3 * z
    for k in range(rank // 4 * 4, rank):
        a0, b0, r0 = a[k], b[k], right[k, column : column + m]
        for j in range(m):
            p[j] += a0 * r0[j]
            q[j] += b0 * r0[j]


@kernel
def _sum_one(a: Doubles, right: Floats | Doubles, column: int, p: Doubles) -> None:
    """Fill p [m] with the entries of the row a [rank] times `right` from a column on."""
    m, rank = p.shape[0], right.shape[0]
    p[:] = 0.0
    for k in range(0, rank - 3, 4):
        a0, a1, a2, a3 = a[k], a[k + 1], a[k + 2], a[k + 3]
        r0, r1 = right[k, column : column + m], right[k + 1, column : column + m]
        r2, r3 = right[k + 2, column : column + m], right[k + 3, column : column + m]
        for j in range(m):
            p[j] = (((p[j] + a0 * r0[j]) + a1 * r1[j]) + a2 * r2[j]) + a3 * r3[j]
    for k in range(rank // 4 * 4, rank):
        a0, r0 = a[k], right[k, column : column + m]
        for j in range(m):
            p[j] += a0 * r0[j]


@kernel
def _add_scaled(sums: Doubles, scale: float, out: Floats | Doubles) -> None:
    """Add sums [m] times `scale`, rounded to the dtype of `out`, to `out` [m]."""
    for j in range(out.shape[0]):
        out[j] += out.dtype.type(sums[j] * scale)
