"""What becomes of the experts of one layer: groups of members, each of which becomes one expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from mediator_cli.kernels.arrays import Counts, Doubles


@dataclass(frozen=True)
class Group:
    """Experts that become one, the centre first, and their merge coefficients, which sum to 1.

    `orders` has for each member the order of its inner neurons that fits the centre's [inner]; None where it stays.
    """

    members: tuple[int, ...]
    weights: tuple[float, ...]
    orders: tuple[Counts | None, ...] = ()

    @property
    def centre(self) -> int:
        """The member that the others are aligned to and that gives the router's row where one row is kept."""
        return self.members[0]


def make_groups(members: Iterable[Sequence[int]], importance: Doubles) -> tuple[Group, ...]:
    """Put the centre first in each group, weigh members by their importance [experts], order groups by their centres.

    The centre is the most important member, of equals the first. Where none of a group has any, all weigh the same.

    >>> make_groups([[2], [0, 1]], np.array([1.0, 3.0, 0.0]))[1]
    Group(members=(2,), weights=(1.0,), orders=())
    >>> make_groups([[2], [0, 1]], np.array([1.0, 3.0, 0.0]))[0]
    Group(members=(1, 0), weights=(0.75, 0.25), orders=())
    """
    ranked = (sorted(group, key=lambda expert: (-importance[expert], expert)) for group in members)
    return tuple(Group(tuple(group), shares(importance[group])) for group in sorted(ranked, key=lambda group: group[0]))


def shares(importance: Doubles) -> tuple[float, ...]:
    """Scale the importance of members to a sum of 1; equal shares where the sum is 0."""
    total = float(importance.sum())
    found = importance / total if total > 0 else np.full(len(importance), 1 / len(importance))
    return tuple(float(share) for share in found)


def most_important(importance: Doubles, n: int) -> list[int]:
    """Choose the n experts of most importance [experts], of equals the first; in order of importance.

    >>> most_important(np.array([1.0, 2.0, 2.0]), 2)
    [1, 2]
    """
    return [int(expert) for expert in np.argsort(-importance, kind="stable")[:n]]


def cosines(products: Doubles) -> Doubles:
    """Turn the inner products of vectors [n, n] into their cosines; 0 with a vector of length 0, 1 with itself."""
    lengths = np.sqrt(np.diag(products))
    safe = np.where(lengths > 0, lengths, 1.0)
    found: Doubles = np.clip(products / np.outer(safe, safe), -1.0, 1.0)
    np.fill_diagonal(found, 1.0)
    return found
