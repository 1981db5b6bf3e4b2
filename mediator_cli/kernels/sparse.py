"""Which entries of a delta a sparse expert keeps, where they lie, and what storing them loses, slab by slab.

Masks are bools [m]. What is kept of a slab is found once, as places [k] counted from its start. Loops over kept
entries store every entry and go on behind the kept ones alone, which costs less than a branch that cannot be foretold.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mediator_cli.kernels.arrays import Bytes, Counts, Doubles, Flags, Floats, Halves, Words
from mediator_cli.kernels.jit import kernel
from mediator_cli.kernels.lanes import LANES, TILE, aligned, total

_ESCAPE = 255
_INT8_MAX = 127.0
_STRIDE = 1024

Steps = NDArray[np.int8]
"""Values as whole steps of a scale."""


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
def find_kept(mask: Flags, places: Words) -> int:
    """List the places of kept entries [m] in `places`, which has room for one more; return how many there are."""
    flags, count = np.zeros(_STRIDE, np.bool_), 0
    words = flags.view(np.uint64)
    if 8 * places.shape[0] > mask.shape[0]:
        for i in range(mask.shape[0]):
            places[count] = np.uint32(i)
            count += int(mask[i])
        return count
    # Where few are kept, most words of eight flags are zero.
    for t in range(0, mask.shape[0], _STRIDE):
        part = mask[t : t + _STRIDE]
        flags[part.shape[0] :] = False
        for i in range(part.shape[0]):
            flags[i] = part[i]
        for w in range(words.shape[0]):
            if words[w]:
                for i in range(8 * w, 8 * w + 8):
                    places[count] = np.uint32(t + i)
                    count += int(flags[i])
    return count


@kernel
def count_gap_bytes(places: Words, first: int, position: int) -> tuple[int, int]:
    """Count the bytes that `write_gaps` writes; return it with the new position."""
    count = places.shape[0]
    if not count:
        return 0, position
    n_bytes = count + (first + int(places[0]) - position) // _ESCAPE
    last, here = places[:-1], places[1:]
    escapes = np.uint32(0)
    for k in range(here.shape[0]):
        escapes += np.uint32(np.uint32(here[k] - last[k] - np.uint32(1)) // np.uint32(_ESCAPE))
    return int(n_bytes + escapes), first + int(places[count - 1]) + 1


@kernel
def write_gaps(places: Words, first: int, position: int, out: Bytes) -> tuple[int, int]:
    """Write the places of kept entries [k] of a slab, which begins at entry `first` of its tensor, as gap bytes.

    `position` is the one behind the last entry kept before. A byte below 255 skips that many entries and keeps the
    next, 255 skips 255 and keeps none. Returns the number of bytes and the new position.
    """
    at = 0
    for k in range(places.shape[0]):
        gap = first + int(places[k]) - position
        position += gap + 1
        while gap >= _ESCAPE:
            out[at] = _ESCAPE
            at += 1
            gap -= _ESCAPE
        out[at] = gap
        at += 1
    return at, position


@kernel
def gather(delta: Floats, places: Words, factor: float, out: Floats) -> None:
    """Write the entries of delta [m] at some places [k] times `factor`, in float32, to `out` [k]."""
    scale = np.float32(factor)
    for k in range(places.shape[0]):
        out[k] = delta[places[k]] * scale


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
def square_sums(delta: Floats, places: Words, bounds: Counts, decoded: Floats, inverse: float, block: int) -> Doubles:
    """Sum delta² and the squared error of what is read back over each block of entries [m]; [blocks, 2].

    `decoded` [k] times `inverse` is read back at `places` [k], elsewhere nothing; those of block b are the places
    from bounds[b] to bounds[b + 1].
    """
    sums = np.empty((-(-delta.shape[0] // block), 2), np.float64)
    for b in range(sums.shape[0]):
        start, stop = bounds[b], bounds[b + 1]
        energy = sum_squares(delta[b * block : (b + 1) * block])
        held, lost = sum_kept_squares(delta, places[start:stop], decoded[start:stop], inverse)
        # What is not kept is lost. The difference is off by some 10⁻¹⁵ of the energy, whose shares are told to six
        # digits.
        sums[b, 0], sums[b, 1] = energy, max(energy - held, 0.0) + lost
    return sums


@kernel
def sum_squares(values: Floats) -> float:
    """Sum v² over values [m]."""
    tile, lanes = np.empty(TILE, np.float32), aligned(LANES)
    lanes[:] = 0.0
    for t in range(0, values.shape[0], TILE):
        part = values[t : t + TILE]
        if part.shape[0] < TILE:
            fill_tile(values, t, tile)
            part = tile
        x, y, z, u = part[:LANES], part[LANES : 2 * LANES], part[2 * LANES : 3 * LANES], part[3 * LANES :]
        for k in range(LANES):
            a, b, c, d = np.float64(x[k]), np.float64(y[k]), np.float64(z[k]), np.float64(u[k])
            lanes[k] = (((lanes[k] + a * a) + b * b) + c * c) + d * d
    return total(lanes)


@kernel
def sum_kept_squares(delta: Floats, places: Words, decoded: Floats, inverse: float) -> tuple[float, float]:
    """Sum delta² and (delta - inverse · decoded)² over the entries of delta [m] at some places [k]."""
    tile, given = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    held, lost = aligned(LANES), aligned(LANES)
    held[:] = 0.0
    lost[:] = 0.0
    for t in range(0, places.shape[0], TILE):
        chosen = places[t : t + TILE]
        fill_tile(decoded, t, given)
        tile[chosen.shape[0] :] = np.float32(0)
        for i in range(chosen.shape[0]):
            tile[i] = delta[chosen[i]]
        for q in range(0, TILE, LANES):
            x, y = tile[q : q + LANES], given[q : q + LANES]
            for k in range(LANES):
                wide = np.float64(x[k])
                error = wide - np.float64(y[k]) * inverse
                held[k] += wide * wide
                lost[k] += error * error
    return total(held), total(lost)


@kernel
def subtract_bf16(values: Floats, dense: Halves, out: Floats) -> None:
    """Round finite values [m] to bfloat16, ties to even, and subtract bfloat16 bits [m] from them, in float32."""
    bits, target = values.view(np.uint32), out.view(np.uint32)
    room = np.empty(_STRIDE, np.uint32)
    floats = room.view(np.float32)
    for t in range(0, bits.shape[0], _STRIDE):
        part, other = bits[t : t + _STRIDE], dense[t : t + _STRIDE]
        rounded, result = target[t : t + _STRIDE], out[t : t + _STRIDE]
        for i in range(part.shape[0]):
            v = part[i]
            odd = np.uint32((v >> np.uint32(16)) & np.uint32(1))
            rounded[i] = np.uint32(np.uint32(v + np.uint32(0x7FFF) + odd) & np.uint32(0xFFFF0000))
            room[i] = np.uint32(np.uint32(other[i]) << np.uint32(16))
        for i in range(part.shape[0]):
            result[i] -= floats[i]


@kernel
def take_signs(positive: Flags, scale: float, out: Floats) -> None:
    """Turn flags [k] into plus or minus `scale`, in float32."""
    up, down = np.float32(scale), np.float32(-scale)
    for i in range(positive.shape[0]):
        out[i] = up if positive[i] else down


@kernel
def give_steps(values: Floats, scale: float, out: Steps) -> None:
    """Round values [k] to whole steps of `scale`, ties to even, none beyond 127."""
    for i in range(values.shape[0]):
        step = np.rint(np.float64(values[i]) / scale)
        out[i] = np.int8(max(min(step, _INT8_MAX), -_INT8_MAX))


@kernel
def take_steps(steps: Steps, scale: float, out: Floats) -> None:
    """Turn steps [k] into their multiples of `scale`, computed in float64."""
    for i in range(steps.shape[0]):
        out[i] = np.float32(np.float64(steps[i]) * scale)


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
