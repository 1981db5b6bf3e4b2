"""How much a correction changes the reaction of each expert's rows, and the gradient of that."""

from __future__ import annotations

import numpy as np

from mediator_cli.kernels.arrays import Floats
from mediator_cli.kernels.jit import kernel

LANES = 64
"""Sums run in so many lanes, which are added up at the end."""


@kernel
def reaction_gradient(deltas: Floats, moved: Floats, rest: Floats, slope: np.float32, out: Floats) -> None:
    """Set `out` [rows, columns] to Σ (rest [n, rows] + slope · the row of delta · moved) · the row of delta.

    `deltas` are [n, rows, columns], `moved` is [rows, columns]. All that concerns a row is done while it is near.
    """
    lanes = np.empty(LANES, np.float32)
    for r in range(moved.shape[0]):
        row, found = moved[r], out[r]
        found[:] = np.float32(0)
        for j in range(deltas.shape[0]):
            delta = deltas[j, r]
            factor = rest[j, r] + slope * _dot(delta, row, lanes)
            for i in range(found.shape[0]):
                found[i] += delta[i] * factor


@kernel
def _dot(first: Floats, second: Floats, lanes: Floats) -> np.float32:
    lanes[:] = np.float32(0)
    for start in range(0, first.shape[0], LANES):
        a, b = first[start : start + LANES], second[start : start + LANES]
        for i in range(a.shape[0]):
            lanes[i] += a[i] * b[i]
    total = np.float32(0)
    for i in range(LANES):
        total += lanes[i]
    return total
