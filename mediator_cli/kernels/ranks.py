"""Order of magnitudes by their bits: the magnitude of a float32 is ordered like its bits without the sign."""

from __future__ import annotations

import numpy as np

from mediator_cli.kernels.arrays import Floats, Longs, Words
from mediator_cli.kernels.jit import kernel

MAGNITUDE = 0x7FFFFFFF
"""The bits of a float32 without its sign."""
_TILE = 1024


@kernel
def gather_inside(row: Floats, low: int, width: int, found: Words) -> tuple[int, int]:
    """Gather the magnitudes of a row [m] whose bits lie in [low, low + width), as offsets from `low`, into `found` [m].

    Returns how many lie above the bracket and how many were gathered. Fast where few are.
    """
    bits, start, size = row.view(np.uint32), np.uint32(low), np.uint32(width)
    mask, top = np.uint32(MAGNITUDE), np.uint32(low + width)
    flags = np.zeros(_TILE, np.uint8)
    eights = flags.view(np.uint64)
    n_above, n_found = np.int64(0), np.int64(0)
    for t in range(0, bits.shape[0], _TILE):
        part = bits[t : t + _TILE]
        if part.shape[0] < _TILE:
            flags[:] = np.uint8(0)
        above = np.uint32(0)
        for i in range(part.shape[0]):
            magnitude = np.uint32(part[i] & mask)
            above += np.uint32(magnitude >= top)
            flags[i] = np.uint8(np.uint32(magnitude - start) < size)
        n_above += above
        # Eight flags at a time are most often all zero, so this branch is foretold.
        for w in range(eights.shape[0]):
            if eights[w]:
                for i in range(8 * w, 8 * w + 8):
                    if flags[i]:
                        found[n_found] = np.uint32(np.uint32(part[i] & mask) - start)
                        n_found += 1
    return int(n_above), int(n_found)


@kernel
def count_offsets(found: Words, n_found: int, table: Words) -> None:
    """Count each of the gathered offsets in `table`, which has room for all."""
    for i in range(n_found):
        table[found[i]] += np.uint32(1)


@kernel
def sum_offsets(found: Words, n_found: int, shift: int, table: Longs) -> None:
    """Count gathered offsets by their upper bits, and sum their lower `shift` bits and the squares of these: [3, n]."""
    step, rest = np.uint32(shift), np.uint32((1 << shift) - 1)
    counts, sums, squares = table[0], table[1], table[2]
    for i in range(n_found):
        at, low = found[i] >> step, np.uint64(found[i] & rest)
        counts[at] += np.uint64(1)
        sums[at] += low
        squares[at] += low * low
