"""Which entries a sparse expert keeps: a tensor's own largest, or those that reach a limit over the model."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from mediator_cli.checkpoint.blocks import BLOCK
from mediator_cli.engine.extract.item import Item
from mediator_cli.engine.pool import Stopped, run_all
from mediator_cli.engine.select import Ranked, select
from mediator_cli.engine.streams import draw
from mediator_cli.engine.sweep import all_of, carry_out
from mediator_cli.kernels.sparse import find_kept, gather, mask_largest, mask_random
from mediator_cli.stages.extract import kept_count

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from mediator_cli.engine.extract.item import Extraction, Part
    from mediator_cli.engine.select import Threshold
    from mediator_cli.engine.streams import Piece
    from mediator_cli.engine.sweep import Search
    from mediator_cli.kernels.arrays import Counts, Flags, Floats, Words
    from mediator_cli.plan.model import TensorPlan


@dataclass(frozen=True)
class Limit:
    """Entries above `value` are kept, and the first `ties` of those that equal it."""

    value: float
    ties: int


def choose(
    items: Sequence[Item], limits: Mapping[tuple[str, str], Limit], workers: int, advance: Callable[[int], None]
) -> dict[tuple[str, str], Limit]:
    """Find what is kept of each tensor, by expert and tensor; `limits` are those over the model."""
    choices: dict[tuple[str, str], Limit] = {}
    ranked: list[tuple[Item, int]] = []
    for item in items:
        extract, size = item.tensor.extract, item.tensor.size
        count = kept_count(extract.density, size)
        if extract.over == "model":
            choices[item.key] = limits[item.key]
        elif extract.select == "random" or count == size:
            choices[item.key] = Limit(0.0, 0)
        else:
            ranked.append((item, count))
    found = carry_out(all_of([_ranks(item, count) for item, count in ranked]), workers, advance)
    for (item, count), ((threshold,),) in zip(ranked, found, strict=True):
        choices[item.key] = Limit(threshold.value, count - threshold.n_above)
    return choices


def _ranks(item: Item, count: int) -> Search[list[list[Threshold]]]:
    return select(Ranked(item.rows, item.pieces(), lambda piece, inputs: inputs.rows, 1), [[count]])


def common_limits(
    job: Extraction, tensors: Sequence[TensorPlan], workers: int, advance: Callable[[int], None]
) -> dict[tuple[str, str], Limit]:
    """Rank the entries of several tensors together, for each expert; they share one density.

    Of entries that equal the limit those of the first tensors are kept.
    """
    size = sum(tensor.size for tensor in tensors)
    if not size:
        return {}
    count = kept_count(tensors[0].extract.density, size)
    if count == size:
        return {(name, tensor.name): Limit(0.0, 0) for name in job.experts for tensor in tensors}
    found = carry_out(all_of([_over_all(job, name, tensors, count) for name in job.experts]), workers, advance)
    limits: dict[tuple[str, str], Limit] = {}
    for name, ((threshold,),) in zip(job.experts, found, strict=True):
        items = [Item(job, name, tensor) for tensor in tensors]
        ties = _share_ties(items, threshold, count - threshold.n_above, workers)
        limits |= {item.key: Limit(threshold.value, n) for item, n in zip(items, ties, strict=True)}
    return limits


def _over_all(job: Extraction, expert: str, tensors: Sequence[TensorPlan], count: int) -> Search[list[list[Threshold]]]:
    items = {tensor.name: Item(job, expert, tensor) for tensor in tensors}
    parts = [piece for item in items.values() for piece in item.pieces()]
    rows = Ranked(lambda piece: items[piece.tensor].rows(piece), parts, lambda piece, inputs: inputs.rows, 1)
    return select(rows, [[count]])


def _share_ties(items: Sequence[Item], threshold: Threshold, left: int, workers: int) -> list[int]:
    """Say how many of the entries that equal a threshold each tensor keeps; they are counted if not all are kept."""
    if not threshold.value or threshold.n_equal <= left:
        return [item.tensor.size for item in items]
    value = np.float32(threshold.value)
    counts: dict[Piece, int] = {}

    def count(part: tuple[Item, Piece]) -> None:
        item, piece = part
        counts[piece] = int(np.count_nonzero(np.abs(item.part(piece).delta) == value))

    run_all(count, [(item, piece) for item in items for piece in item.pieces()], workers)
    ties: list[int] = []
    for item in items:
        ties.append(min(left, sum(counts[piece] for piece in item.pieces())))
        left -= ties[-1]
    return ties


@dataclass(frozen=True)
class Slab:
    """A slab [m] and what is kept of it: as a mask, and as places [k] counted from its start.

    Those of block b are places[bounds[b] : bounds[b + 1]].
    """

    piece: Piece
    part: Part
    mask: Flags
    places: Words
    bounds: Counts

    def gather(self, factor: float) -> Floats:
        """Give the kept values [k] times the factor."""
        gather(self.part.delta, self.places, factor, out := np.empty(len(self.places), np.float32))
        return out

    def by_block(self, values: Floats) -> list[Floats]:
        """Cut kept values [k] where blocks end."""
        return [values[start:stop] for start, stop in pairwise(self.bounds.tolist())]


def slabs(item: Item, limit: Limit) -> Iterator[Slab]:
    """Go through a tensor in order; give each slab with what is kept of it."""
    ties, extract = limit.ties, item.tensor.extract
    for piece in item.pieces():
        if item.job.stop.is_set():
            raise Stopped
        part, mask = item.part(piece), np.empty(piece.size, np.bool_)
        if extract.select == "random":
            uniforms = np.empty(piece.size, np.float32)
            draw(item.job.seed, item.expert, piece, uniforms)
            mask_random(part.delta, uniforms, extract.density, mask)
        else:
            ties -= mask_largest(part.delta, limit.value, ties, mask)
        yield _slab(piece, part, mask)


def _slab(piece: Piece, part: Part, mask: Flags) -> Slab:
    room = np.empty(np.count_nonzero(mask) + 1, np.uint32)
    places = room[: find_kept(mask, room)]
    starts = np.arange(0, piece.size + BLOCK, BLOCK, dtype=np.uint32)
    return Slab(piece, part, mask, places, np.searchsorted(places, starts))
