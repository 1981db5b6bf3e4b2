"""A family tree in letters: one row for each leaf, joins to the right of it at their distance."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_WIDTH = 40
Join = tuple[tuple[str, ...], tuple[str, ...], float]
"""Two clusters of leaves that become one, and the value at which they do."""


def dendrogram(order: Sequence[str], joins: Sequence[Join], leaf: float, show: Callable[[float], str]) -> Iterator[str]:
    r"""Draw joins, nearest first, whose leaves stand in `order`; `leaf` is the value at the left.

    Behind the tree stands the value at which the row's line ends in another.

    >>> tree = [(("a",), ("b",), 0.9), (("a", "b"), ("c",), 0.0)]
    >>> print("\n".join(dendrogram("abc", tree, 1.0, "{:.2f}".format)))
    a ────┬───────────────────────────────────┐
    b ────┘                                   │  0.90
    c ────────────────────────────────────────┘  0.00
    """
    places = _places(order, joins, leaf)
    width = max((column for _, _, column, _ in places), default=0) + 1
    rows = [[" "] * width for _ in order]
    reach = [0] * len(order)
    for top, bottom, column, _ in places:
        for row in (top, bottom):
            if reach[row]:
                rows[row][reach[row] - 1] = "┬"
            rows[row][reach[row] : column] = "─" * (column - reach[row])
            reach[row] = column + 1
        rows[top][column], rows[bottom][column] = "┐", "┘"
        for row in range(top + 1, bottom):
            rows[row][column] = "│"
    values = {bottom: show(value) for _, bottom, _, value in places}
    longest = max(map(len, order))
    for at, (name, line) in enumerate(zip(order, rows, strict=True)):
        yield f"{name:<{longest}} {''.join(line)}  {values.get(at, '')}".rstrip()


def _places(order: Sequence[str], joins: Sequence[Join], leaf: float) -> list[tuple[int, int, int, float]]:
    """Give the two rows, the column and the value of each join; the upper row is the one that goes on."""
    far = max((abs(leaf - value) for *_, value in joins), default=0.0) or 1.0
    ends: dict[tuple[str, ...], tuple[int, int]] = {(name,): (row, -1) for row, name in enumerate(order)}
    found = []
    for left, right, value in joins:
        (first, low), (second, other) = ends.pop(left), ends.pop(right)
        column = max(round(abs(leaf - value) / far * _WIDTH), low + 1, other + 1)
        ends[left + right] = (min(first, second), column)
        found.append((min(first, second), max(first, second), column, value))
    return found
