"""Loops of the merge methods: tiles of a slab that stay in the first cache, sums in recipe order in float32."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mediator_cli.kernels.arrays import Doubles, Flags, Floats
from mediator_cli.kernels.jit import kernel

Ranked = NDArray[np.uint64]
"""A magnitude's bits above the position where it lies."""

TILE = 1024
"""Entries of a row that are worked on at a time."""
LANES = 512
"""Sums in float64 run in so many lanes, which are added up at the end."""
MEAN, SUM, MAX = 0, 1, 2
"""How agreeing entries are merged."""


@kernel
def weighted_sum(rows: Floats, weights: Floats, divisor: np.float32, factor: np.float32, out: Floats) -> None:
    """Set `out` [m] to Σ weights [n] · rows [n, m] / divisor · factor."""
    for start in range(0, rows.shape[1], TILE):
        part = out[start : start + TILE]
        first, weight = rows[0, start : start + part.shape[0]], weights[0]
        for i in range(part.shape[0]):
            part[i] = first[i] * weight
        _add_weighted(rows, start, weights, part)
        for i in range(part.shape[0]):
            part[i] = part[i] / divisor * factor


@kernel
def _add_weighted(rows: Floats, start: int, weights: Floats, out: Floats) -> None:
    for r in range(1, rows.shape[0]):
        row, weight = rows[r, start : start + out.shape[0]], weights[r]
        for i in range(out.shape[0]):
            out[i] += row[i] * weight


@kernel
def elect(
    rows: Floats,
    limits: Floats,
    votes: Floats,
    weights: Floats,
    tie: np.float32,
    merge: int,
    floor: np.float32,
    factor: np.float32,
    out: Floats,
) -> None:
    """Elect a sign for each entry of rows [n, m] and merge to `out` [m] what has it.

    Entries below their row's limit [n] count as zero. The sign is that of Σ votes [n] · row, or `tie` where that is
    zero. MEAN divides by the weights [n] of those who agree, at least `floor`; where they are none the result is zero.
    """
    signs, mass = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    for start in range(0, rows.shape[1], TILE):
        part = out[start : start + TILE]
        _tally(rows, start, limits, votes, signs[: part.shape[0]])
        _to_signs(signs, tie)
        if merge == MAX:
            _largest(rows, start, limits, weights, signs, factor, part)
        else:
            _gather(rows, start, limits, weights, signs, mass[: part.shape[0]], part)
            _finish(signs, mass, merge, floor, factor, part)


@kernel
def _tally(rows: Floats, start: int, limits: Floats, votes: Floats, total: Floats) -> None:
    total[:] = np.float32(0)
    for r in range(rows.shape[0]):
        row, limit, vote = rows[r, start : start + total.shape[0]], limits[r], votes[r]
        for i in range(total.shape[0]):
            total[i] += row[i] * vote if abs(row[i]) >= limit else np.float32(0)


@kernel
def _to_signs(total: Floats, tie: np.float32) -> None:
    for i in range(total.shape[0]):
        sign = np.float32(1) if total[i] > np.float32(0) else np.float32(-1)
        total[i] = tie if total[i] == np.float32(0) else sign


@kernel
def _gather(
    rows: Floats, start: int, limits: Floats, weights: Floats, signs: Floats, mass: Floats, out: Floats
) -> None:
    """Sum magnitudes and weights of the entries that agree: sums of magnitudes round like sums of signed values."""
    zero, one = np.float32(0), np.float32(1)
    mass[:] = zero
    out[:] = zero
    for r in range(rows.shape[0]):
        row, limit, weight = rows[r, start : start + out.shape[0]], limits[r], weights[r]
        for i in range(out.shape[0]):
            # A product with one of them changes no bit; one with the total could underflow.
            along = row[i] * weight * (one if signs[i] > zero else -one)
            agrees = (abs(row[i]) >= limit) & (along > zero)
            out[i] += along if agrees else zero
            mass[i] += weight if agrees else zero


@kernel
def _finish(signs: Floats, mass: Floats, merge: int, floor: np.float32, factor: np.float32, out: Floats) -> None:
    zero, one = np.float32(0), np.float32(1)
    for i in range(out.shape[0]):
        least = max(mass[i], floor)
        share = one if (merge == SUM) | (least == zero) else least
        out[i] = out[i] * (one if signs[i] > zero else -one) / share * factor


@kernel
def _largest(
    rows: Floats, start: int, limits: Floats, weights: Floats, signs: Floats, factor: np.float32, out: Floats
) -> None:
    zero, one = np.float32(0), np.float32(1)
    out[:] = zero
    for r in range(rows.shape[0]):
        row, limit, weight = rows[r, start : start + out.shape[0]], limits[r], weights[r]
        for i in range(out.shape[0]):
            along = row[i] * weight * (one if signs[i] > zero else -one)
            out[i] = max(out[i], along if abs(row[i]) >= limit else zero)
    for i in range(out.shape[0]):
        out[i] = out[i] * signs[i] * factor


@kernel
def count_signs(rows: Floats, limits: Floats, votes: Floats) -> int:
    """Count the signs that entries of rows [n, m] would elect, plus minus minus; see `elect`."""
    balance = 0
    total = np.empty(TILE, np.float32)
    for start in range(0, rows.shape[1], TILE):
        part = total[: min(TILE, rows.shape[1] - start)]
        _tally(rows, start, limits, votes, part)
        for i in range(part.shape[0]):
            balance += (part[i] > np.float32(0)) - (part[i] < np.float32(0))
    return balance


@kernel
def drop(rows: Floats, uniforms: Floats, chance: np.float32, factors: Floats, out: Floats) -> None:
    """Keep entries of rows [n, m] whose uniform number lies below `chance`, times their row's factor [n]."""
    for r in range(rows.shape[0]):
        row, drawn, kept, factor = rows[r], uniforms[r], out[r], factors[r]
        for i in range(row.shape[0]):
            kept[i] = row[i] * factor if drawn[i] < chance else np.float32(0)


@kernel
def drop_each(rows: Floats, uniforms: Floats, chances: Floats, factors: Floats, by_chance: bool, out: Floats) -> None:
    """Keep entries as `drop` does, each by its own chance [n, m]; `by_chance` divides it by that too."""
    one = np.float32(1)
    for r in range(rows.shape[0]):
        row, drawn, chance, kept, factor = rows[r], uniforms[r], chances[r], out[r], factors[r]
        for i in range(row.shape[0]):
            value = row[i] * factor / (chance[i] if by_chance else one)
            kept[i] = value if drawn[i] < chance[i] else np.float32(0)


@kernel
def keep_between(rows: Floats, lower: Floats, upper: Floats, out: Floats) -> None:
    """Keep entries of rows [n, m] whose magnitude lies between their row's limits [n], both included."""
    for r in range(rows.shape[0]):
        row, kept, low, high = rows[r], out[r], lower[r], upper[r]
        for i in range(row.shape[0]):
            is_inside = (abs(row[i]) >= low) & (abs(row[i]) <= high)
            kept[i] = row[i] if is_inside else np.float32(0)


@kernel
def keep_marked(rows: Floats, marks: Flags, out: Floats) -> None:
    """Keep entries of rows [n, m] that are marked [n, m], or those of columns that are marked [1, m]."""
    for r in range(rows.shape[0]):
        row, mark, kept = rows[r], marks[min(r, marks.shape[0] - 1)], out[r]
        for i in range(row.shape[0]):
            kept[i] = row[i] if mark[i] else np.float32(0)


@kernel
def magnitude_sums(rows: Floats, out: Doubles) -> None:
    """Sum the magnitudes of each of rows [n, m] in float64 [n]."""
    lanes = np.empty(LANES, np.float64)
    for r in range(rows.shape[0]):
        lanes[:] = 0.0
        for start in range(0, rows.shape[1], LANES):
            part = rows[r, start : start + LANES]
            for i in range(part.shape[0]):
                lanes[i] += np.float64(abs(part[i]))
        out[r] = lanes.sum()


@kernel
def dot(first: Floats, second: Floats) -> float:
    """Sum the products of two rows [m] in float64."""
    lanes = np.zeros(LANES, np.float64)
    for start in range(0, first.shape[0], LANES):
        a, b = first[start : start + LANES], second[start : start + LANES]
        for i in range(a.shape[0]):
            lanes[i] += np.float64(a[i]) * np.float64(b[i])
    return float(lanes.sum())


@kernel
def variances(rows: Floats, out: Floats) -> None:
    """Set `out` [m] to the population variance over rows [n, m]; exactly zero where all are equal."""
    mean = np.empty(TILE, np.float32)
    for start in range(0, rows.shape[1], TILE):
        part = out[start : start + TILE]
        _mean_apart(rows, start, mean[: part.shape[0]])
        _mean_square(rows, start, mean, part)


@kernel
def _mean_apart(rows: Floats, start: int, out: Floats) -> None:
    """Average the distances from the first row."""
    out[:] = np.float32(0)
    first = rows[0, start : start + out.shape[0]]
    for r in range(1, rows.shape[0]):
        row = rows[r, start : start + out.shape[0]]
        for i in range(out.shape[0]):
            out[i] += row[i] - first[i]
    for i in range(out.shape[0]):
        out[i] /= np.float32(rows.shape[0])


@kernel
def _mean_square(rows: Floats, start: int, mean: Floats, out: Floats) -> None:
    out[:] = np.float32(0)
    first = rows[0, start : start + out.shape[0]]
    for r in range(rows.shape[0]):
        row = rows[r, start : start + out.shape[0]]
        for i in range(out.shape[0]):
            apart = row[i] - first[i] - mean[i]
            out[i] += apart * apart
    for i in range(out.shape[0]):
        out[i] /= np.float32(rows.shape[0])


@kernel
def pack_ranks(rows: Floats, out: Ranked) -> None:
    """Set `out` [rows, length] to keys that sort like magnitudes, equal ones by position; the position stands below."""
    for r in range(rows.shape[0]):
        bits, keys = rows[r].view(np.uint32), out[r]
        for i in range(bits.shape[0]):
            magnitude = np.uint64(bits[i] & np.uint32(0x7FFFFFFF))
            keys[i] = (magnitude << np.uint64(32)) | np.uint64(i)


@kernel
def spread_ranks(keys: Ranked, values: Floats, out: Floats) -> None:
    """Give the entry at each sorted key's position the value of its rank: values [length], `out` [rows, length]."""
    for r in range(keys.shape[0]):
        ordered, row = keys[r], out[r]
        for i in range(ordered.shape[0]):
            row[np.uint32(ordered[i])] = values[i]
