"""Experts that are not stored sparsely: the arrays they share, their gates and their coefficients.

Deltas are rows [n, m] in float32, one for each expert: a slab of one tensor, whatever its cut.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mediator_cli.kernels.unify import unify

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mediator_cli.kernels.arrays import Doubles, Flags, Floats


def sum_rows(rows: Floats) -> Floats:
    """Sum rows [n, m] in their order, in float32: the multi-task vector of TALL-masks; [m]."""
    total = np.zeros(rows.shape[1], np.float32)
    for row in rows:
        total += row
    return total


def elect_task_vector(rows: Floats) -> Floats:
    """Elect the unified task vector of EMR-Merging from rows [n, m]: the largest entry on the side of their sum; [m].

    Where the sum is zero the side is the negative one, as in the authors' programs.

    >>> elect_task_vector(np.array([[3, 1, 0], [-1, -1, 0], [1, 0, 0]], np.float32)).tolist()
    [3.0, -1.0, 0.0]
    """
    return unify(rows, np.ones(len(rows)))


def agrees(row: Floats, elected: Floats) -> Flags:
    """Gate of EMR-Merging: where an expert's delta [m] has the sign of the elected task vector [m]."""
    found: Flags = ((row > 0) & (elected > 0)) | ((row < 0) & (elected < 0))
    return found


def is_own(row: Floats, total: Floats, factor: float) -> Flags:
    """Gate of TALL-masks: where an expert's delta [m] is above `factor` times what the others' sum comes to.

    >>> is_own(np.array([2, 1, 0], np.float32), np.array([3, 5, 0], np.float32), 0.4).tolist()
    [True, False, False]
    """
    found: Flags = np.abs(row) > np.float32(factor) * np.abs(total - row)
    return found


def is_not_negative(row: Floats) -> Flags:
    """Give the bits of BitDelta: a delta [m] of zero counts as positive."""
    found: Flags = ~(row < 0)
    return found


def scale_of(own: float, gated: float) -> float:
    """Scale of EMR-Merging, from the summed magnitudes of an expert and of what its gate lets through; 1 for nothing.

    >>> scale_of(3.0, 4.0), scale_of(0.0, 0.0)
    (0.75, 1.0)
    """
    return own / gated if gated else 1.0


def centred(gram: Doubles) -> Doubles:
    """Turn the inner products [n, n] of rows into those of rows less their mean."""
    off = np.eye(len(gram)) - 1.0 / len(gram)
    inner: Doubles = off @ gram @ off
    return inner


def best_directions(gram: Doubles, count: int) -> Doubles:
    """Coefficients [n, count] of rows, less their mean, over the directions that lose least; columns are orthonormal.

    `gram` [n, n] are the inner products of the rows. With directions Eᵀ · (rows - mean) for these coefficients E, the
    rows E · directions + mean are the nearest of all with so few directions (Eckart and Young). The sign of each
    column is such that its largest entry is positive, the first of equal ones.
    """
    values, vectors = np.linalg.eigh(centred(gram))
    chosen = vectors[:, np.argsort(-values, kind="stable")[:count]]
    largest = np.abs(chosen).argmax(0) if chosen.size else np.zeros(0, np.int64)
    signs: NDArray[np.float64] = np.where(chosen[largest, np.arange(chosen.shape[1])] < 0, -1.0, 1.0)
    result: Doubles = chosen * signs
    return result


def mean_and_directions(rows: Floats, coefficients: Doubles) -> Floats:
    """Compute the mean of rows [n, m], and the directions that belong to coefficients [n, p]; [1 + p, m] in float32."""
    mean = np.zeros(rows.shape[1])
    for row in rows:
        mean += row
    mean /= len(rows)
    found = np.zeros((1 + coefficients.shape[1], rows.shape[1]))
    found[0] = mean
    for row, each in zip(rows, coefficients, strict=True):
        # One row at a time: all of them in float64 would be twice as much as was read.
        apart = row - mean
        for at, coefficient in enumerate(each.tolist(), 1):
            found[at] += coefficient * apart
    return found.astype(np.float32)


def rebuild(shared: Floats, coefficients: Doubles) -> Floats:
    """Compute Σ coefficient [k] · shared array [k, m] in float32, in the order of arrays, as a reader does; [m]."""
    factors = coefficients.astype(np.float32)
    total: Floats = shared[0] * factors[0]
    for array, factor in zip(shared[1:], factors[1:], strict=True):
        total += array * factor
    return total
