"""Sums of products of several rows, for the directions in which experts differ."""

from __future__ import annotations

import numpy as np

from mediator_cli.kernels.arrays import Doubles, Floats
from mediator_cli.kernels.jit import kernel
from mediator_cli.kernels.lanes import LANES, TILE, aligned, total
from mediator_cli.kernels.sparse import fill_tile


@kernel
def inner_products(rows: Floats) -> Doubles:
    """Sum the products of all pairs of rows [n, m] in float64; [n, n]."""
    n, lanes = rows.shape[0], aligned(LANES)
    left, right = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    sums = np.empty((n, n), np.float64)
    for a in range(n):
        for b in range(a + 1):
            lanes[:] = 0.0
            for t in range(0, rows.shape[1], TILE):
                fill_tile(rows[a], t, left)
                fill_tile(rows[b], t, right)
                for q in range(0, TILE, LANES):
                    x, y = left[q : q + LANES], right[q : q + LANES]
                    for k in range(LANES):
                        lanes[k] += np.float64(x[k]) * np.float64(y[k])
            sums[a, b] = sums[b, a] = total(lanes)
    return sums
