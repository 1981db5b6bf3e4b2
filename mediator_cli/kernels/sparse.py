"""Which entries of a delta a sparse expert keeps, where they lie, and what storing them loses, slab by slab.

Masks are bools [m]. Loops over kept entries store every entry and go on behind the kept ones alone, which costs less
than a branch that cannot be foretold.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mediator_cli.kernels.arrays import Bytes, Counts, Doubles, Flags, Floats
from mediator_cli.kernels.jit import kernel
from mediator_cli.kernels.lanes import LANES, TILE, aligned, total

_ESCAPE = 255
_INT8_MAX = 127.0


@kernel
def mask_largest(delta: Floats, threshold: float, n_ties: int, mask: Flags) -> int:
    """Mask entries [m] above the threshold and the first `n_ties` that equal it; zeros are never kept.

    Returns how many of the ties are used.
    """
    limit, used = np.float32(threshold), 0
    for t in range(0, delta.shape[0], TILE):
        part, kept = delta[t : t + TILE], mask[t : t + TILE]
        equal = 0
        for i in range(part.shape[0]):
            kept[i] = abs(part[i]) > limit
            equal += abs(part[i]) == limit
        if limit == np.float32(0) or equal == 0 or used == n_ties:
            continue
        if equal <= n_ties - used:
            used += equal
            for i in range(part.shape[0]):
                kept[i] = abs(part[i]) >= limit
            continue
        for i in range(part.shape[0]):
            if used < n_ties and abs(part[i]) == limit:
                kept[i] = True
                used += 1
    return used


@kernel
def mask_random(delta: Floats, uniforms: Floats, density: float, mask: Flags) -> None:
    """Mask entries [m] whose uniform number is below `density`, in float32; zeros are never kept."""
    limit, zero = np.float32(density), np.float32(0)
    for i in range(delta.shape[0]):
        mask[i] = (uniforms[i] < limit) & (delta[i] != zero)


@kernel
def find_kept(kept: Flags, places: Counts) -> int:
    """List the places of kept entries [m] in `places`, which has room for m; return how many there are."""
    count = 0
    for i in range(kept.shape[0]):
        places[count] = i
        count += int(kept[i])
    return count


@kernel
def count_gap_bytes(mask: Flags, first: int, position: int) -> tuple[int, int]:
    """Count the bytes that `write_gaps` writes; return it with the new position."""
    places, n_bytes = np.empty(TILE, np.int64), 0
    for t in range(0, mask.shape[0], TILE):
        count = find_kept(mask[t : t + TILE], places)
        n_bytes += count
        for k in range(count):
            place = first + t + places[k]
            n_bytes += (place - position) // _ESCAPE
            position = place + 1
    return n_bytes, position


@kernel
def write_gaps(mask: Flags, first: int, position: int, out: Bytes) -> tuple[int, int]:
    """Write the places of kept entries [m], of which the first is entry `first` of its tensor, as gap bytes.

    `position` is the one behind the last entry kept before. A byte below 255 skips that many entries and keeps the
    next, 255 skips 255 and keeps none. Returns the number of bytes and the new position.
    """
    places, at = np.empty(TILE, np.int64), 0
    for t in range(0, mask.shape[0], TILE):
        for k in range(find_kept(mask[t : t + TILE], places)):
            gap = first + t + places[k] - position
            position += gap + 1
            while gap >= _ESCAPE:
                out[at] = _ESCAPE
                at += 1
                gap -= _ESCAPE
            out[at] = gap
            at += 1
    return at, position


@kernel
def gather(delta: Floats, mask: Flags, factor: float, out: Floats) -> int:
    """Write the kept entries [k] times `factor`, in float32, to the start of `out`; return how many there are."""
    scale, found, n = np.float32(factor), np.empty(TILE, np.float32), 0
    for t in range(0, delta.shape[0], TILE):
        part, kept = delta[t : t + TILE], mask[t : t + TILE]
        count = 0
        for i in range(part.shape[0]):
            found[count] = part[i] * scale
            count += int(kept[i])
        out[n : n + count] = found[:count]
        n += count
    return n


@kernel
def add_kept(dense: Floats, mask: Flags, decoded: Floats, out: Floats) -> None:
    """Add decoded values [k] to the kept entries of `dense` [m]; the others stay as they are, to the bit."""
    values, given, at = padded(decoded), np.empty(TILE, np.float32), 0
    for t in range(0, dense.shape[0], TILE):
        part, kept, target = dense[t : t + TILE], mask[t : t + TILE], out[t : t + TILE]
        for i in range(part.shape[0]):
            given[i] = values[at]
            at += int(kept[i])
        for i in range(part.shape[0]):
            target[i] = part[i] + given[i] if kept[i] else part[i]


@kernel
def padded(values: Floats) -> Floats:
    """Copy values [k] into [k + 1], so that the one behind the last may be read."""
    room = np.zeros(values.shape[0] + 1, np.float32)
    room[:-1] = values
    return room


@kernel
def find_differing(left: NDArray[Any], right: NDArray[Any], first: int, out: Counts) -> int:
    """List the places where integers [m] differ, counted from `first`; `out` has room for all; return how many."""
    n = 0
    for t in range(0, left.shape[0], TILE):
        a, b = left[t : t + TILE], right[t : t + TILE]
        differing = 0
        for i in range(a.shape[0]):
            differing += a[i] != b[i]
        if differing:
            for i in range(a.shape[0]):
                if a[i] != b[i]:
                    out[n] = first + t + i
                    n += 1
    return n


@kernel
def square_sums(delta: Floats, mask: Flags, decoded: Floats, inverse: float, block: int) -> Doubles:
    """Sum delta² and (delta - inverse · decoded)² over each block of entries [m]; [blocks, 2].

    `decoded` [k] has what is read back of the kept entries; of the others nothing is.
    """
    values, tile, given = padded(decoded), np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    energy, error = aligned(LANES), aligned(LANES)
    sums, at = np.empty((-(-delta.shape[0] // block), 2), np.float64), 0
    for b in range(sums.shape[0]):
        row, marks = delta[b * block : (b + 1) * block], mask[b * block : (b + 1) * block]
        energy[:] = 0.0
        error[:] = 0.0
        for t in range(0, row.shape[0], TILE):
            part, kept = row[t : t + TILE], marks[t : t + TILE]
            if part.shape[0] < TILE:
                tile[:] = np.float32(0)
                given[:] = np.float32(0)
            for i in range(part.shape[0]):
                given[i] = values[at]
                at += int(kept[i])
            for i in range(part.shape[0]):
                tile[i] = part[i]
                given[i] = given[i] if kept[i] else np.float32(0)
            for q in range(0, TILE, LANES):
                x, y = tile[q : q + LANES], given[q : q + LANES]
                for k in range(LANES):
                    wide = np.float64(x[k])
                    lost = wide - np.float64(y[k]) * inverse
                    energy[k] += wide * wide
                    error[k] += lost * lost
        sums[b, 0], sums[b, 1] = total(energy), total(error)
    return sums


@kernel
def sum_magnitudes(values: Floats) -> float:
    """Sum |v| over values [k]."""
    tile, lanes = np.zeros(TILE, np.float32), aligned(LANES)
    lanes[:] = 0.0
    for t in range(0, values.shape[0], TILE):
        fill_tile(values, t, tile)
        for q in range(0, TILE, LANES):
            part = tile[q : q + LANES]
            for k in range(LANES):
                lanes[k] += abs(np.float64(part[k]))
    return total(lanes)


@kernel
def fill_tile(values: Floats, start: int, tile: Floats) -> None:
    """Copy values from `start` into a tile, and zeros behind them."""
    part = values[start : start + TILE]
    tile[: part.shape[0]] = part
    tile[part.shape[0] :] = np.float32(0)


@kernel
def sum_step_errors(values: Floats, scales: Doubles) -> Doubles:
    """Sum, for each scale [c], the squared error of values [k] stored as int8 steps; [c]."""
    tile, lanes = np.zeros(TILE, np.float32), aligned(scales.shape[0] * LANES).reshape(-1, LANES)
    lanes[:] = 0.0
    for t in range(0, values.shape[0], TILE):
        fill_tile(values, t, tile)
        for c in range(scales.shape[0]):
            # Where a product rounds another way than the quotient, both steps are as far away.
            scale, inverse, sums = scales[c], 1.0 / scales[c], lanes[c]
            for q in range(0, TILE, LANES):
                part = tile[q : q + LANES]
                for k in range(LANES):
                    wide = np.float64(part[k])
                    step = max(min(np.rint(wide * inverse), _INT8_MAX), -_INT8_MAX)
                    lost = step * scale - wide
                    sums[k] += lost * lost
    return np.array([total(lanes[c]) for c in range(scales.shape[0])])


@kernel
def sum_steps(values: Floats, scale: float) -> tuple[float, float]:
    """Sum v·q and q² over values [k] stored as int8 steps q of a scale."""
    tile, inner, norm = np.zeros(TILE, np.float32), aligned(LANES), aligned(LANES)
    inner[:] = 0.0
    norm[:] = 0.0
    for t in range(0, values.shape[0], TILE):
        fill_tile(values, t, tile)
        for q in range(0, TILE, LANES):
            part = tile[q : q + LANES]
            for k in range(LANES):
                wide = np.float64(part[k])
                step = max(min(np.rint(wide / scale), _INT8_MAX), -_INT8_MAX)
                inner[k] += wide * step
                norm[k] += step * step
    return total(inner), total(norm)
