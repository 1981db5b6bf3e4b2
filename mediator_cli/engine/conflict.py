"""Count how much experts disagree in every tensor, by sweeps: over all entries, or over some blocks of each."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from mediator_cli.checkpoint.blocks import BLOCK
from mediator_cli.engine.select import Ranked, select
from mediator_cli.engine.streams import Piece, cut
from mediator_cli.engine.sweep import Sweep, all_of, sum_sweep
from mediator_cli.stages.conflict import block_moments, count_conflicts, far_from_mean, keep_at_least, keep_nonzero
from mediator_cli.stages.sample import BlockSample, draw_blocks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from mediator_cli.engine.streams import Inputs, Streams
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
        parts = {name: cut({name: size}, slab) for name, size in some.items()}
        rules = yield from _thresholds(streams, parts, denoise.top_fraction)
        found |= yield from _counts(streams, some, rules, slab)
    return found


def sample_tensors(
    streams: Streams, sizes: Mapping[str, int], denoise: DenoiseSpec, share: float
) -> Search[dict[str, BlockSample]]:
    """Count conflicts in blocks drawn at random from each tensor that is not empty, the same ones for the same seed.

    Which entries count is found from the same blocks. For a process that works alone.
    """
    drawn = {name: drawn_pieces(streams.seed, name, size, share) for name, size in sizes.items() if size}
    rules = yield from _sampled_rules(streams, drawn, denoise)

    def values(piece: Piece, inputs: Inputs) -> Doubles:
        return count_conflicts(inputs.rows, rules[piece.tensor], BLOCK)

    counts = yield from _by_block(streams, drawn, values)
    return {name: BlockSample(counts[name], -(-sizes[name] // BLOCK)) for name in drawn}


def drawn_pieces(seed: int, tensor: str, size: int, share: float) -> list[Piece]:
    """Draw blocks of a tensor, as pieces in their order."""
    key = hashlib.blake2b(f"{seed}\0sample\0{tensor}".encode(), digest_size=8).digest()
    blocks = draw_blocks(int.from_bytes(key, "little") >> 1, -(-size // BLOCK), share).tolist()
    return [Piece(tensor, at * BLOCK, min((at + 1) * BLOCK, size)) for at in blocks]


def _sampled_rules(
    streams: Streams, drawn: Mapping[str, Sequence[Piece]], denoise: DenoiseSpec
) -> Search[dict[str, Rule]]:
    n, n_std, fraction = len(streams.names), denoise.keep_above_std, denoise.top_fraction
    sizes = {name: sum(piece.size for piece in parts) for name, parts in drawn.items()}
    if fraction is not None:
        found: dict[str, Rule] = {}
        for some in _shares(sizes, n):
            found |= yield from _thresholds(streams, {name: drawn[name] for name in some}, fraction)
        return found
    if n_std is None:
        return dict.fromkeys(sizes, keep_nonzero(n))

    def values(piece: Piece, inputs: Inputs) -> Doubles:
        return block_moments(inputs.rows, BLOCK).reshape(1, 2 * n)

    moments = yield from _by_block(streams, drawn, values)
    return {name: far_from_mean(moments[name].sum(axis=0).reshape(2, n), sizes[name], n_std) for name in sizes}


def _by_block(
    streams: Streams, drawn: Mapping[str, Sequence[Piece]], values: Callable[[Piece, Inputs], Doubles]
) -> Search[dict[str, Doubles]]:
    """Gather what each drawn block gives [1, k], by tensor and in the order of blocks: [drawn, k]."""
    found: dict[Piece, Doubles] = {}

    def look(piece: Piece, inputs: Inputs) -> None:
        found[piece] = values(piece, inputs)

    parts = [piece for pieces in drawn.values() for piece in pieces]
    yield [Sweep(streams.deltas, parts, look, list)]
    return {name: np.concatenate([found[piece] for piece in pieces]) for name, pieces in drawn.items()}


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


def _thresholds(streams: Streams, parts: Mapping[str, Sequence[Piece]], fraction: float) -> Search[dict[str, Rule]]:
    """Keep the largest entries among the pieces of each tensor."""
    n, searches = len(streams.names), []
    for pieces in parts.values():
        count = max(1, int(sum(piece.size for piece in pieces) * fraction))
        searches.append(select(Ranked(streams.deltas, pieces, lambda piece, inputs: inputs.rows, n), [[count]] * n))
    found = yield from all_of(searches)
    return {
        name: keep_at_least(np.array([row[0].value for row in rows], np.float32))
        for name, rows in zip(parts, found, strict=True)
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
