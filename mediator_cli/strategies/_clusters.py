"""k-means on a few rows, and clusters as lists of names; deterministic, also where rows are the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mediator_cli.errors import CheckpointError, Problem

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

_DIGITS = 6
"""Rows that differ by less are the same."""
_STARTS = 10


def cluster(rows: Floats, names: Sequence[str], k: int, seed: int) -> list[tuple[str, ...]]:
    """Share names out to exactly k clusters by k-means on their rows [names, features], in the order of first members.

    With fewer different rows than clusters, the last members of the largest clusters get clusters of their own.
    """
    check_count(k, len(names), "cluster")
    labels = _labels(np.round(rows, _DIGITS), k, seed)
    groups = [[at for at, label in enumerate(labels) if label == own] for own in dict.fromkeys(labels)]
    while len(groups) < k:
        largest = max(groups, key=len)
        groups.append([largest.pop()])
    return [tuple(names[at] for at in group) for group in sorted(groups)]


def check_count(k: int, n: int, what: str) -> None:
    """Refuse to choose more than there are; raises CheckpointError."""
    if not 1 <= k <= n:
        message = f"{k} of {n} are asked for"
        raise CheckpointError(Problem(f"{what} k", message, f"give a number from 1 to {n}"))


def _labels(rows: Floats, k: int, seed: int) -> list[int]:
    distinct, which = np.unique(rows, axis=0, return_inverse=True)
    which = which.ravel()
    if len(distinct) <= k:
        return [int(label) for label in which]
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    # Of several threads the sums differ in the last bit. What stands twice weighs twice.
    with threadpool_limits(1):
        found = KMeans(k, n_init=_STARTS, random_state=seed).fit(distinct, sample_weight=np.bincount(which))
    return [int(label) for label in found.labels_[which]]
