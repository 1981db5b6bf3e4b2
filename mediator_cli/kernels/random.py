"""Random numbers that depend on a key and a position alone, not on order, threads or slabs."""

from __future__ import annotations

import numpy as np

from mediator_cli.kernels.arrays import Floats
from mediator_cli.kernels.jit import kernel


@kernel
def fill_uniforms(key: int, start: int, out: Floats) -> None:
    """Fill `out` [m] with uniform numbers in [0, 1) for positions from `start`: 24 bits of splitmix64 each.

    Position i gives the i-th output of the generator seeded with `key` (Steele, Lea and Flood, OOPSLA 2014).
    """
    first = np.uint64(key) + np.uint64(start + 1) * np.uint64(0x9E3779B97F4A7C15)
    for i in range(out.shape[0]):
        z = first + np.uint64(i) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
        out[i] = np.float32(z >> np.uint64(40)) * np.float32(2.0**-24)
