"""The statistics that methods declare, found by streaming before slabs are combined."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from mediator_cli.engine.reduce import blocks_of, metered, sum_blocks
from mediator_cli.engine.select import select_magnitudes
from mediator_cli.engine.streams import pieces
from mediator_cli.methods.registry import Select, Slab

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from mediator_cli.engine.streams import Budget, Piece, Streams
    from mediator_cli.methods.registry import ResolvedMethod, Statistic, Sum
    from mediator_cli.plan.model import TensorPlan

    Mapper = Callable[[Callable[[Piece], torch.Tensor], Sequence[Piece]], Iterable[torch.Tensor]]

Found = dict[str, dict[str, torch.Tensor]]
"""Statistics by tensor name, then by statistic name."""


@dataclass(frozen=True)
class Group:
    """All tensors that one resolved method merges: what "the model" is for its statistics."""

    method: ResolvedMethod
    tensors: tuple[TensorPlan, ...]

    @property
    def n_read(self) -> int:
        """Elements of each source that are read to find the statistics."""
        return sum(_passes(statistic) for statistic in self.method.needed_statistics()) * sum(
            tensor.size for tensor in self.tensors
        )


def _passes(statistic: Statistic) -> int:
    return 2 if isinstance(statistic, Select) else 1


def group_by_method(tensors: Iterable[TensorPlan]) -> tuple[Group, ...]:
    """Gather tensors that are not empty by method and parameters, in the order of their first tensor."""
    groups: dict[str, tuple[ResolvedMethod, list[TensorPlan]]] = {}
    for tensor in tensors:
        if tensor.average is not None and tensor.size:
            groups.setdefault(tensor.average.key, (tensor.average, []))[1].append(tensor)
    return tuple(Group(method, tuple(members)) for method, members in groups.values())


def find_statistics(streams: Streams, group: Group, budget: Budget, advance: Callable[[int], None]) -> Found:
    """Find all statistics of a group, in the order in which the method declares them."""
    found: Found = {tensor.name: {} for tensor in group.tensors}
    for statistic in group.method.needed_statistics():
        over = statistic.over(group.method.params)
        cells = [group.tensors] if over == "model" else [(tensor,) for tensor in group.tensors]
        values = _find(_Search(streams, group.method, statistic, found), cells, budget, advance)
        for cell, value in zip(cells, list(values), strict=True):
            for tensor in cell:
                found[tensor.name][statistic.name] = value
    return found


@dataclass(frozen=True)
class _Search:
    """One statistic to find, and those found before it."""

    streams: Streams
    method: ResolvedMethod
    statistic: Statistic
    found: Found

    def slab(self, piece: Piece) -> Slab:
        inputs, _ = self.streams.inputs(piece, self.method.method.space)
        uniforms = self.streams.uniforms(piece) if self.method.method.random else None
        return Slab(inputs, self.streams.weights, self.method.params, self.found[piece.tensor], uniforms)


def _find(
    search: _Search, cells: Sequence[Sequence[TensorPlan]], budget: Budget, advance: Callable[[int], None]
) -> Iterable[torch.Tensor]:
    """Work through cells: a single one with its slabs in parallel, many of them side by side."""

    def slabs_in_parallel(function: Callable[[Piece], Any], parts: Sequence[Piece]) -> Iterable[Any]:
        return metered(function, parts, budget, lambda piece: advance(piece.stop - piece.start))

    def one(cell: Sequence[TensorPlan], mapper: Mapper = map) -> torch.Tensor:
        parts = [piece for tensor in cell for piece in pieces(tensor.name, tensor.size, budget.slab)]
        if isinstance(search.statistic, Select):
            return _select(search, search.statistic, parts, mapper)
        return _sum(search, search.statistic, parts, mapper)

    if len(cells) == 1:
        return [one(cells[0], slabs_in_parallel)]
    passes = _passes(search.statistic)
    return metered(one, cells, budget, lambda cell: advance(passes * sum(tensor.size for tensor in cell)))


def _select(search: _Search, statistic: Select, parts: Sequence[Piece], mapper: Mapper) -> torch.Tensor:
    size = sum(piece.stop - piece.start for piece in parts)
    n = len(search.streams.names)
    k = statistic.count(search.method.params, size)
    if k >= size:
        return torch.zeros(n)
    thresholds = select_magnitudes(parts, lambda piece: statistic.of(search.slab(piece)), [k] * n, mapper)
    return torch.tensor([threshold.value for threshold in thresholds])


def _sum(search: _Search, statistic: Sum, parts: Sequence[Piece], mapper: Mapper) -> torch.Tensor:
    def values(piece: Piece) -> torch.Tensor:
        return torch.stack([statistic.block(block) for block in _cut(search.slab(piece))])

    return sum_blocks(mapper(values, parts))


def _cut(slab: Slab) -> list[Slab]:
    inputs = blocks_of(slab.inputs)
    uniforms: Sequence[torch.Tensor | None] = [None] * len(inputs)
    if slab.uniforms is not None:
        uniforms = blocks_of(slab.uniforms)
    return [replace(slab, inputs=i, uniforms=u) for i, u in zip(inputs, uniforms, strict=True)]
