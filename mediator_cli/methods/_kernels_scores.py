"""Loops of methods that score entries: competition (PCB), conflict (trust region), curvature (OTA), blocks (CABS)."""

from __future__ import annotations

import math

import numpy as np

from mediator_cli.kernels.arrays import Doubles, Flags, Floats
from mediator_cli.kernels.jit import kernel

_TILE = 1024
_SMALL = 0.02
"""Below this the series of tanh is exact in float64."""
_LOG2_E, _LN_2 = 1.4426950408889634, 0.6931471805599453
_TO_BITS = 1.5 * 2.0**52 + 1023
"""Added to a small number: its whole part plus a float64's bias is then in the lowest bits."""


@kernel
def conflicts(rows: Floats, weights: Floats, out: Floats) -> None:
    """Set `out` [m] to the sum over ordered pairs of different rows [n, m] of the products of their magnitudes."""
    total, pairs = np.empty(_TILE, np.float64), np.empty(_TILE, np.float64)
    for start in range(0, rows.shape[1], _TILE):
        part = out[start : start + _TILE]
        total[:] = 0.0
        pairs[:] = 0.0
        for r in range(rows.shape[0]):
            row, weight = rows[r, start : start + part.shape[0]], weights[r]
            for i in range(part.shape[0]):
                size = np.float64(abs(row[i] * weight))
                # Each row with all before it: a difference of squares would lose what is small beside a large one.
                pairs[i] += size * total[i]
                total[i] += size
        for i in range(part.shape[0]):
            part[i] = np.float32(2.0 * pairs[i])


@kernel
def add_used(rows: Floats, weights: Floats, tall: np.float32, k: int, factor: np.float32, out: Floats) -> None:
    """Sum rows [n, m], times weights [n] and `factor`, to `out` [m] where k of them are above `tall` · what is left."""
    total, n_users = np.empty(_TILE, np.float32), np.empty(_TILE, np.float32)
    for start in range(0, rows.shape[1], _TILE):
        part = out[start : start + _TILE]
        total[:] = np.float32(0)
        n_users[:] = np.float32(0)
        for r in range(rows.shape[0]):
            row, weight = rows[r, start : start + part.shape[0]], weights[r]
            for i in range(part.shape[0]):
                total[i] += row[i] * weight
        for r in range(rows.shape[0]):
            row, weight = rows[r, start : start + part.shape[0]], weights[r]
            for i in range(part.shape[0]):
                own = row[i] * weight
                n_users[i] += np.float32(abs(own) > tall * abs(total[i] - own))
        for i in range(part.shape[0]):
            part[i] = total[i] * factor if n_users[i] >= k else np.float32(0)


@kernel
def shares(row: Floats, low: np.float32, high: np.float32, out: Doubles) -> None:
    """Set `out` [m] to where the clipped magnitudes of a row [m] lie: 0 at `low`, 1 at `high`; 0 if both are one."""
    width = np.float64(high) - np.float64(low)
    for i in range(row.shape[0]):
        inside = np.float64(min(max(abs(row[i]), low), high)) - np.float64(low)
        out[i] = inside / width if width > 0.0 else 0.0


@kernel
def competition(rows: Floats, low: Floats, high: Floats, normalized: bool, out: Floats) -> None:
    """Set `out` [n, m] to e^(n·(aᵢ² - 1)) · tanh(row · Σ other), with a the `shares` of the rows [n, m].

    Others are the rows, or their signed shares where `normalized`.
    """
    n = rows.shape[0]
    inside, total, along = np.empty((n, _TILE), np.float64), np.empty(_TILE, np.float64), np.empty(_TILE, np.float64)
    for start in range(0, rows.shape[1], _TILE):
        end = min(start + _TILE, rows.shape[1])
        total[:] = 0.0
        for r in range(n):
            row = rows[r, start:end]
            shares(row, low[r], high[r], inside[r])
            for i in range(end - start):
                one = math.copysign(inside[r, i], row[i]) if row[i] != 0 else 0.0
                total[i] += one if normalized else np.float64(row[i])
        for r in range(n):
            row, found, own = rows[r, start:end], out[r, start:end], inside[r, : end - start]
            for i in range(end - start):
                along[i] = np.float64(row[i]) * total[i]
                own[i] = n * (own[i] * own[i] - 1.0)
            _tanh(along[: end - start])
            _exp(own)
            for i in range(end - start):
                found[i] = np.float32(own[i] * along[i])


@kernel
def _tanh(values: Doubles) -> None:
    """Replace values by their tanh, to float64; without calls where all are small."""
    n_large = 0
    for i in range(values.shape[0]):
        n_large += abs(values[i]) >= _SMALL
    if n_large:
        for i in range(values.shape[0]):
            values[i] = math.tanh(values[i]) if abs(values[i]) >= _SMALL else _series(values[i])
        return
    for i in range(values.shape[0]):
        values[i] = _series(values[i])


@kernel
def _series(x: float) -> float:
    """Give the tanh of a small number."""
    square = x * x
    return x * (1.0 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315 - square * (62 / 2835)))))


@kernel
def _exp(values: Doubles) -> None:
    """Replace values from -700 to 0 by e to their power, to 10 digits; less counts as -700. A loop without calls."""
    whole = np.empty(values.shape[0], np.float64)
    bits = whole.view(np.int64)
    for i in range(values.shape[0]):
        # The nearest whole power of two stands in the lowest bits of the sum, where it becomes an exponent.
        x = max(values[i], -700.0)
        whole[i] = x * _LOG2_E + _TO_BITS
        rest = x - (whole[i] - _TO_BITS) * _LN_2
        inner = 1 / 120 + rest * (1 / 720 + rest * (1 / 5040 + rest * (1 / 40320 + rest * (1 / 362880))))
        values[i] = 1.0 + rest * (1.0 + rest * (1 / 2 + rest * (1 / 6 + rest * (1 / 24 + rest * inner))))
    for i in range(values.shape[0]):
        bits[i] = bits[i] << 52
    for i in range(values.shape[0]):
        values[i] *= whole[i]


@kernel
def balance(
    rows: Floats, low: Floats, high: Floats, scores: Floats, least: Floats, most: Floats, weights: Floats, out: Floats
) -> None:
    """Average clipped rows [n, m], times weights [n], by their scores [n, m] above `least` [n], as shares of `most`."""
    mass, total = np.empty(_TILE, np.float64), np.empty(_TILE, np.float64)
    for start in range(0, rows.shape[1], _TILE):
        part = out[start : start + _TILE]
        mass[:] = 0.0
        total[:] = 0.0
        for r in range(rows.shape[0]):
            row, score = rows[r, start : start + part.shape[0]], scores[r, start : start + part.shape[0]]
            floor, width = np.float64(least[r]), np.float64(most[r]) - np.float64(least[r])
            for i in range(part.shape[0]):
                share = (np.float64(score[i]) - floor) / width if score[i] > least[r] else 0.0
                size = min(max(abs(row[i]), low[r]), high[r]) if row[i] != 0 else np.float32(0)
                mass[i] += share
                total[i] += share * math.copysign(np.float64(size), np.float64(row[i])) * np.float64(weights[r])
        for i in range(part.shape[0]):
            part[i] = np.float32(total[i] / max(mass[i], 1e-12))


@kernel
def sizes_left(blocks: Floats, taken: Flags, out: Floats) -> None:
    """Set `out` [blocks, m] to the magnitudes of what is not taken yet, and zero."""
    for b in range(blocks.shape[0]):
        block, gone, left = blocks[b], taken[b], out[b]
        for i in range(block.shape[0]):
            left[i] = np.float32(0) if gone[i] else abs(block[i])


@kernel
def take_largest(sizes: Floats, limits: Floats, n_kept: int, taken: Flags, marks: Flags) -> None:
    """Mark in each block of sizes [blocks, m] what lies above its limit, and the first equal to it until they are n.

    What is taken already is not marked, though it may count; what is marked is taken.
    """
    for b in range(sizes.shape[0]):
        block, gone, mark, limit = sizes[b], taken[b], marks[b], limits[b]
        n_above = 0
        for i in range(block.shape[0]):
            n_above += block[i] > limit
        n_equal = n_kept - n_above
        for i in range(block.shape[0]):
            is_equal = (block[i] == limit) & (n_equal > 0)
            n_equal -= is_equal
            mark[i] = ((block[i] > limit) | is_equal) & (not gone[i])
            gone[i] = gone[i] | mark[i]


@kernel
def by_curvature(
    rows: Floats,
    moments: Floats,
    marks: Flags,
    weights: Doubles,
    power: float,
    epsilon: float,
    fallback: bool,
    out: Floats,
) -> None:
    """Average marked entries of rows [n, m] to `out` [m] by weights [n] · moments ** power + epsilon.

    Where none is marked: the plain mean, or zero without `fallback`.
    """
    mass, total, plain = np.empty(_TILE, np.float64), np.empty(_TILE, np.float64), np.empty(_TILE, np.float64)
    for start in range(0, rows.shape[1], _TILE):
        part = out[start : start + _TILE]
        mass[:], total[:], plain[:] = 0.0, 0.0, 0.0
        for r in range(rows.shape[0]):
            end = start + part.shape[0]
            row, moment, mark = rows[r, start:end], moments[r, start:end], marks[r, start:end]
            for i in range(part.shape[0]):
                value = np.float64(moment[i])
                curved = math.sqrt(value) if power == 0.5 else value**power
                weight = weights[r] * curved + epsilon if mark[i] else 0.0
                mass[i] += weight
                total[i] += weight * np.float64(row[i])
                plain[i] += np.float64(row[i])
        for i in range(part.shape[0]):
            rest = plain[i] / rows.shape[0] if fallback else 0.0
            part[i] = np.float32(total[i] / mass[i] if mass[i] != 0.0 else rest)
