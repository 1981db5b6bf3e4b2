"""Count how much experts disagree in every tensor, by sweeps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mediator_cli.checkpoint.blocks import BLOCK
from mediator_cli.engine.select import Ranked, select
from mediator_cli.engine.streams import cut
from mediator_cli.engine.sweep import all_of, sum_sweep
from mediator_cli.stages.conflict import block_moments, count_conflicts, far_from_mean, keep_at_least, keep_nonzero

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from mediator_cli.engine.streams import Inputs, Piece, Streams
    from mediator_cli.engine.sweep import Search
    from mediator_cli.kernels.arrays import Doubles
    from mediator_cli.recipe.schema import DenoiseSpec
    from mediator_cli.stages.conflict import Rule

_ROW_ELEMENTS = 1 << 27
"""Entries, over all experts, of the tensors whose thresholds are looked for at a time: each has tables of its own."""


def count_tensors(
    streams: Streams, sizes: Mapping[str, int], denoise: DenoiseSpec, slab: int
) -> Search[dict[str, Doubles]]:
    """Count conflicts in each tensor: vectors as `unpack_counts` reads them."""
    if denoise.top_fraction is None:
        rules = yield from _rules(streams, sizes, denoise, slab)
        return (yield from _counts(streams, sizes, rules, slab))
    found: dict[str, Doubles] = {}
    for some in _shares(sizes, len(streams.names)):
        rules = yield from _thresholds(streams, some, denoise.top_fraction, slab)
        found |= yield from _counts(streams, some, rules, slab)
    return found


def _rules(streams: Streams, sizes: Mapping[str, int], denoise: DenoiseSpec, slab: int) -> Search[dict[str, Rule]]:
    """Say by tensor which entries count."""
    if denoise.keep_above_std is None:
        return dict.fromkeys(sizes, keep_nonzero(len(streams.names)))
    n = len(streams.names)

    def values(piece: Piece, inputs: Inputs) -> Doubles:
        return block_moments(inputs.rows, BLOCK).reshape(-1, 2 * n)

    ((moments,),) = yield [sum_sweep(streams.deltas, sizes, cut(sizes, slab), 2 * n, values)]
    return {
        name: far_from_mean(row.reshape(2, n), size, denoise.keep_above_std)
        for (name, size), row in zip(sizes.items(), moments, strict=True)
    }


def _thresholds(streams: Streams, sizes: Mapping[str, int], fraction: float, slab: int) -> Search[dict[str, Rule]]:
    n = len(streams.names)
    searches = [
        select(
            Ranked(streams.deltas, cut({name: size}, slab), lambda piece, inputs: inputs.rows, n),
            [[max(1, int(size * fraction))]] * n,
        )
        for name, size in sizes.items()
    ]
    found = yield from all_of(searches)
    return {
        name: keep_at_least(np.array([row[0].value for row in rows], np.float32))
        for name, rows in zip(sizes, found, strict=True)
    }


def _counts(
    streams: Streams, sizes: Mapping[str, int], rules: Mapping[str, Rule], slab: int
) -> Search[dict[str, Doubles]]:
    n = len(streams.names)

    def values(piece: Piece, inputs: Inputs) -> Doubles:
        return count_conflicts(inputs.rows, rules[piece.tensor], BLOCK)

    width = 3 * n * n + n + 2
    ((counts,),) = yield [sum_sweep(streams.deltas, sizes, cut(sizes, slab), width, values)]
    return dict(zip(sizes, counts, strict=True))


def _shares(sizes: Mapping[str, int], n: int) -> Iterator[dict[str, int]]:
    some: dict[str, int] = {}
    for name, size in sizes.items():
        if some and (sum(some.values()) + size) * n > _ROW_ELEMENTS:
            yield some
            some = {}
        some[name] = size
    if some:
        yield some
