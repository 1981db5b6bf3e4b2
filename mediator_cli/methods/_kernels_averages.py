"""Loops of the methods that average or choose entries: inner products, arcs, largest, shared and unique entries."""

from __future__ import annotations

import math

import numpy as np

from mediator_cli.kernels.arrays import Counts, Doubles, Floats
from mediator_cli.kernels.jit import kernel
from mediator_cli.methods._kernels import TILE, dot


@kernel
def row_grams(rows: Floats, out: Doubles) -> None:
    """Set `out` [rows, n, n] to the inner products, in float64, of rows [n, rows, length] that stand side by side."""
    for at in range(rows.shape[1]):
        for i in range(rows.shape[0]):
            for j in range(i + 1):
                found = dot(rows[j, at], rows[i, at])
                out[at, i, j] = found
                out[at, j, i] = found


@kernel
def arc(t: float, angle: float, flat: float) -> tuple[float, float]:
    """Give the coefficients of slerp at `t`, those of a straight line where the angle's sine is below `flat`."""
    sine = math.sin(angle)
    if sine < flat:
        return 1.0 - t, t
    return math.sin((1.0 - t) * angle) / sine, math.sin(t * angle) / sine


@kernel
def arc_each(rows: Floats, angles: Doubles, t: float, flat: float, out: Floats) -> None:
    """Set `out` [m] to slerp of rows [2, m] with an angle for each entry [m]."""
    last = math.nan
    first, second = np.float32(0), np.float32(0)
    for i in range(out.shape[0]):
        if angles[i] != last:
            last = angles[i]
            a, b = arc(t, last, flat)
            first, second = np.float32(a), np.float32(b)
        out[i] = rows[0, i] * first + rows[1, i] * second


@kernel
def add_largest(rows: Floats, weights: Floats, factor: np.float32, out: Floats) -> None:
    """Set `out` [m] to the largest of weights [n] · rows [n, m] by magnitude, the later of equal ones, times factor."""
    for start in range(0, out.shape[0], TILE):
        part = out[start : start + TILE]
        part[:] = np.float32(0)
        for r in range(rows.shape[0]):
            row, weight = rows[r, start : start + part.shape[0]], weights[r]
            for i in range(part.shape[0]):
                value = row[i] * weight
                part[i] = value if abs(value) >= abs(part[i]) else part[i]
        for i in range(part.shape[0]):
            part[i] *= factor


@kernel
def count_shared(rows: Floats, epsilon: np.float32, out: Doubles) -> None:
    """Count in `out` [2, n] each row's entries above `epsilon` that another of rows [n, m] has too, and the others."""
    out[:] = 0.0
    counts = np.empty(TILE, np.int64)
    for start in range(0, rows.shape[1], TILE):
        part = counts[: min(TILE, rows.shape[1] - start)]
        _count_changed(rows, start, epsilon, part)
        for r in range(rows.shape[0]):
            row, shared, unique = rows[r, start : start + part.shape[0]], 0, 0
            for i in range(part.shape[0]):
                is_changed = abs(row[i]) > epsilon
                shared += is_changed & (part[i] > 1)
                unique += is_changed & (part[i] == 1)
            out[0, r] += shared
            out[1, r] += unique


@kernel
def _count_changed(rows: Floats, start: int, epsilon: np.float32, out: Counts) -> None:
    out[:] = 0
    for r in range(rows.shape[0]):
        row = rows[r, start : start + out.shape[0]]
        for i in range(out.shape[0]):
            out[i] += abs(row[i]) > epsilon


@kernel
def merge_shared(rows: Floats, weights: Floats, epsilon: np.float32, boosts: Floats, out: Floats) -> None:
    """Average what several of rows [n, m] changed by more than `epsilon`; what one alone did, times its boost [n]."""
    counts = np.empty(TILE, np.int64)
    for start in range(0, rows.shape[1], TILE):
        part = out[start : start + TILE]
        several = counts[: part.shape[0]]
        _count_changed(rows, start, epsilon, several)
        part[:] = np.float32(0)
        for r in range(rows.shape[0]):
            row, weight, alone = rows[r, start : start + part.shape[0]], weights[r], weights[r] * boosts[r]
            for i in range(part.shape[0]):
                factor = alone if several[i] == 1 else weight
                part[i] += row[i] * factor if abs(row[i]) > epsilon else np.float32(0)
        for i in range(part.shape[0]):
            part[i] /= np.float32(max(several[i], 1))


@kernel
def divergences(experts: Floats, bases: Floats, epsilon: float, out: Doubles) -> None:
    """Set `out` [rows] to Σ p·log(p / q) of softmaxes, plus `epsilon` each, of rows [rows, length]; never negative."""
    for at in range(out.shape[0]):
        expert, base = experts[at], bases[at]
        top_p, total_p = _softmax_sums(expert)
        top_q, total_q = _softmax_sums(base)
        total = 0.0
        for i in range(expert.shape[0]):
            p = math.exp(np.float64(expert[i]) - top_p) / total_p + epsilon
            q = math.exp(np.float64(base[i]) - top_q) / total_q + epsilon
            total += p * math.log(p / q)
        out[at] = max(total, 0.0)


@kernel
def _softmax_sums(row: Floats) -> tuple[float, float]:
    """Give a row's largest entry, and the sum of exponentials of the distances to it."""
    top, total = -math.inf, 0.0
    for i in range(row.shape[0]):
        top = max(top, np.float64(row[i]))
    for i in range(row.shape[0]):
        total += math.exp(np.float64(row[i]) - top)
    return top, total
