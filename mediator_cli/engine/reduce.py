"""Sums over whole tensors that do not depend on slabs or threads: per fixed block, then in block order."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from mediator_cli.engine.pool import map_ordered
from mediator_cli.engine.streams import BLOCK, pieces

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from mediator_cli.engine.streams import Budget, Piece


def blocks_of(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Cut rows [n, m] or a row [m] that starts on a block into blocks of up to BLOCK entries."""
    return torch.split(rows, BLOCK, dim=-1)


def sum_blocks(partial: Iterable[torch.Tensor], start: torch.Tensor | None = None) -> torch.Tensor:
    """Add slabs of block values [blocks, …] to `start`, default 0, in float64 in block order.

    A running sum, so that no small tensor outlives its slab: thousands of them would keep the heap from shrinking.
    """
    total = torch.zeros((), dtype=torch.float64) if start is None else start
    for values in partial:
        for value in values:
            total = total + value
    return total


def metered(
    function: Callable[[Any], Any], items: Sequence[Any], budget: Budget, advance: Callable[[Any], None]
) -> Iterator[Any]:
    """Map in parallel and in order, telling `advance` of each item that is done."""
    for item, result in zip(items, map_ordered(function, items, budget.workers), strict=True):
        advance(item)
        yield result


def sum_tensors(
    sizes: dict[str, int],
    block_values: Callable[[Piece], torch.Tensor],
    budget: Budget,
    advance: Callable[[Piece], None],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Sum `block_values` [blocks, …] over each tensor; tensors in order, empty ones left out."""
    parts = [piece for name, size in sizes.items() for piece in pieces(name, size, budget.slab)]
    results = zip(parts, metered(block_values, parts, budget, advance), strict=True)
    for name, group in groupby(results, key=lambda pair: pair[0].tensor):
        yield name, sum_blocks(values for _, values in group)
