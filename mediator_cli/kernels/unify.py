"""One change for all: the elected task vector of EMR-Merging."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mediator_cli.kernels.jit import kernel

if TYPE_CHECKING:
    from mediator_cli.kernels.arrays import Doubles, Floats

_TILE = 1024


def unify(deltas: Floats, weights: Doubles) -> Floats:
    """Elect a sign for each entry, minus where the sum is zero, and take the largest magnitude that has it; [m].

    Deltas [n, m] are multiplied by weights [n]; where none has the elected sign the entry is zero.
    """
    unified = np.empty(deltas.shape[1], np.float32)
    _unify(np.ascontiguousarray(deltas, np.float32), np.asarray(weights, np.float32), unified)
    return unified


@kernel
def _unify(rows: Floats, weights: Floats, out: Floats) -> None:
    total = np.empty(_TILE, np.float32)
    for start in range(0, rows.shape[1], _TILE):
        part = out[start : start + _TILE]
        total[:] = np.float32(0)
        for r in range(rows.shape[0]):
            row, weight = rows[r, start : start + part.shape[0]], weights[r]
            for i in range(part.shape[0]):
                total[i] += row[i] * weight
        _take_largest(rows, start, weights, total, part)


@kernel
def _take_largest(rows: Floats, start: int, weights: Floats, total: Floats, out: Floats) -> None:
    zero, one = np.float32(0), np.float32(1)
    out[:] = zero
    for r in range(rows.shape[0]):
        row, weight = rows[r, start : start + out.shape[0]], weights[r]
        for i in range(out.shape[0]):
            along = row[i] * weight * (one if total[i] > zero else -one)
            out[i] = max(out[i], along)
    for i in range(out.shape[0]):
        out[i] = out[i] if total[i] > zero else zero - out[i]
