"""Sums over pairs of deltas in every tensor, by sweeps."""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING

import numpy as np

from mediator_cli.checkpoint.blocks import BLOCK
from mediator_cli.engine.streams import cut
from mediator_cli.engine.sweep import Sweep, sum_sweep
from mediator_cli.stages.kinship import block_sums, to_int8, unpack_sums

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mediator_cli.engine.streams import Inputs, Piece, Streams
    from mediator_cli.engine.sweep import Search
    from mediator_cli.kernels.arrays import Doubles, Floats
    from mediator_cli.stages.kinship import PairSums


def kinship_passes(*, int8: bool) -> int:
    """Count how often all sources are read."""
    return 2 if int8 else 1


def sum_tensors(
    streams: Streams, sizes: Mapping[str, int], slab: int, *, int8: bool = False, split: bool = False
) -> Search[dict[str, PairSums]]:
    """Sum the deltas and the products of their pairs over each tensor; for a process that works alone.

    With `int8` they are rounded to 255 levels of the largest magnitude, of the whole model or, with `split`, of each
    tensor.
    """
    n = len(streams.names)
    largest: dict[str, Floats] = {}
    if int8:
        largest = yield from _largest(streams, sizes, slab)
    if largest and not split:
        largest = dict.fromkeys(largest, np.max(list(largest.values()), axis=0))

    def values(piece: Piece, inputs: Inputs) -> Doubles:
        rows = to_int8(inputs.rows, largest[piece.tensor]) if int8 else inputs.rows
        return block_sums(rows, BLOCK)

    ((sums,),) = yield [sum_sweep(streams.deltas, sizes, cut(sizes, slab), n + n * n, values)]
    return {name: unpack_sums(row, n, size) for (name, size), row in zip(sizes.items(), sums, strict=True)}


def _largest(streams: Streams, sizes: Mapping[str, int], slab: int) -> Search[dict[str, Floats]]:
    """Find the largest magnitude of each expert's delta in each tensor; float32 [n]."""
    found = {name: np.zeros(len(streams.names), np.float32) for name in sizes}
    lock = Lock()

    def look(piece: Piece, inputs: Inputs) -> None:
        largest = np.abs(inputs.rows).max(axis=1)
        with lock:
            np.maximum(found[piece.tensor], largest, out=found[piece.tensor])

    yield [Sweep(streams.deltas, cut(sizes, slab), look, list)]
    return found
