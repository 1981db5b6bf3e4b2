"""Weight matching: the order of hidden units with the largest inner product of the weights.

Git Re-Basin (arXiv 2209.04836), algorithm 1. An order says for each place which unit comes to stand there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np

if TYPE_CHECKING:
    from mediator_cli.kernels.arrays import Counts, Doubles

LEAST_GAIN = 1e-12
"""What an order has to be better by than the one that stands, as in the authors' code."""


def entries_of(order: Counts, width: int = 1, share: int = 1) -> Counts:
    """Give the entries along an axis where each `share` units in a row have `width` of them.

    >>> entries_of(np.array([2, 3, 0, 1]), width=2, share=2).tolist()
    [2, 3, 0, 1]
    """
    blocks = order[::share] // share
    return cast("Counts", (blocks[:, None] * width + np.arange(width)).ravel())


def is_identity(order: Counts) -> bool:
    """Whether nothing moves."""
    return bool((order == np.arange(len(order))).all())


def is_order(order: Counts) -> bool:
    """Whether every unit stands somewhere."""
    return len(np.unique(order)) == len(order)


def assign(losses: Doubles) -> Counts:
    """Solve the linear assignment: the order [n] with the least sum of losses [n, n] of place and unit."""
    from scipy.optimize import linear_sum_assignment

    return cast("Counts", np.asarray(linear_sum_assignment(losses)[1], np.int64))


def nearest(gains: Doubles, standing: Counts) -> Counts:
    """Give each place [m] the unit with the largest gain [m, n], the one that stands there where none is better.

    Where no unit is given twice this is the best order: no place could gain more.
    """
    places = np.arange(len(gains))
    best = gains.argmax(axis=1)
    return cast("Counts", np.where(gains[places, standing] >= gains[places, best], standing, best).astype(np.int64))


def best_order(gains: Doubles, standing: Counts) -> Counts:
    """Give the best order for gains [n, n]; the one that stands, if no other is better by more than LEAST_GAIN."""
    quick = nearest(gains, standing)
    found = quick if is_order(quick) else assign(-gains)
    return found if _total(gains, found) > _total(gains, standing) + LEAST_GAIN else standing


def best_in_groups(gains: Doubles, of_groups: Doubles, standing: Counts) -> Counts:
    """Give the best order where groups of units stay together: gains [n, n] of units, [n / k, n / k] of groups.

    The best order inside of every pair of groups is found first, so that the result is the best of all.
    """
    n_groups = len(of_groups)
    k = len(gains) // n_groups
    inside = np.empty((n_groups, n_groups, k), np.int64)
    totals = np.array(of_groups)
    for i in range(n_groups):
        for j in range(n_groups):
            part = gains[i * k : (i + 1) * k, j * k : (j + 1) * k]
            inside[i, j] = best_order(part, np.arange(k))
            totals[i, j] += _total(part, inside[i, j])
    groups = best_order(totals, np.arange(n_groups))
    found = np.concatenate([groups[i] * k + inside[i, groups[i]] for i in range(n_groups)])
    before = _total(gains, standing) + _total(of_groups, standing[::k] // k)
    after = sum(totals[i, groups[i]] for i in range(n_groups))
    return found if after > before + LEAST_GAIN else standing


def _total(gains: Doubles, order: Counts) -> float:
    return float(gains[np.arange(len(order)), order].sum())
