"""Sums in float64 over a fixed number of lanes, so that they are fast and their bits the same on every machine.

Entry k of a tile belongs to lane k % LANES. Loops over a tile add four entries to each lane at once, which spares
loads and stores of the lanes; they stand where they are needed, since a call costs more than a tile.
"""

from __future__ import annotations

import numpy as np

from mediator_cli.kernels.arrays import Doubles
from mediator_cli.kernels.jit import kernel

LANES = 128
TILE = 4 * LANES


@kernel
def aligned(size: int) -> Doubles:
    """Make an array that starts on a cache line: a load of eight numbers across two lines takes twice as long."""
    room = np.empty(size + 8, np.float64)
    skip = (-room.ctypes.data % 64) // 8
    return room[skip : skip + size]


@kernel
def total(lanes: Doubles) -> float:
    """Add up lanes, halving their number again and again; they are overwritten."""
    width = lanes.shape[0] // 2
    while width:
        upper = lanes[width : 2 * width]
        for k in range(width):
            lanes[k] += upper[k]
        width //= 2
    return float(lanes[0])
