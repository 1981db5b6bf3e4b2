"""The statistics that methods declare, found by streaming before slabs are combined."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from mediator_cli.engine.reduce import blocks_of, metered, sum_blocks
from mediator_cli.engine.select import select_passes, select_ranks
from mediator_cli.engine.streams import pieces
from mediator_cli.methods.registry import Select, Slab

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from mediator_cli.engine.streams import Budget, Piece, Streams
    from mediator_cli.methods.registry import ResolvedMethod, Statistic, Sum
    from mediator_cli.plan.model import TensorPlan

    Mapper = Callable[[Callable[[Piece], torch.Tensor], Sequence[Piece]], Iterable[torch.Tensor]]

Found = dict[str, dict[str, torch.Tensor]]
"""Statistics by tensor name, then by statistic name."""


@dataclass(frozen=True)
class Group:
    """All tensors that one method merges with the same choices: what "the model" is for its statistics.

    Numbers such as a density may differ between them: then each tensor has its own threshold over the same model.
    """

    tensors: tuple[TensorPlan, ...]

    @property
    def method(self) -> ResolvedMethod:
        """The method as it is on the first tensor; only numbers differ on the others."""
        return _method_of(self.tensors[0])

    @property
    def n_read(self) -> int:
        """Elements of each source that are read to find the statistics."""
        return sum(
            _passes(statistic, cell) * sum(tensor.size for tensor in cell)
            for statistic in self.method.needed_statistics()
            for cell in self.cells(statistic)
        )

    def cells(self, statistic: Statistic) -> list[tuple[TensorPlan, ...]]:
        """Gather the tensors over which a statistic is taken: all, or each by itself."""
        over = statistic.over(self.method.params)
        return [self.tensors] if over == "model" else [(tensor,) for tensor in self.tensors]


def _method_of(tensor: TensorPlan) -> ResolvedMethod:
    if tensor.average is None:
        raise ValueError(f"{tensor.name} is not merged")
    return tensor.average


def _counts(statistic: Select, cell: Sequence[TensorPlan]) -> list[int]:
    """Give the k of each tensor of a cell; the number of entries is that of the whole cell."""
    size = sum(tensor.size for tensor in cell)
    return [statistic.count(_method_of(tensor).params, size) for tensor in cell]


def _passes(statistic: Statistic, cell: Sequence[TensorPlan]) -> int:
    if not isinstance(statistic, Select):
        return 1
    size = sum(tensor.size for tensor in cell)
    ranks = {count for count in _counts(statistic, cell) if count < size}
    return select_passes(len(ranks)) if ranks else 0


def group_by_method(tensors: Iterable[TensorPlan]) -> tuple[Group, ...]:
    """Gather tensors that are not empty by method and all that is no number, in the order of their first tensor."""
    groups: dict[tuple[object, ...], list[TensorPlan]] = {}
    for tensor in tensors:
        if tensor.average is not None and tensor.size:
            groups.setdefault(_choices(tensor.average), []).append(tensor)
    return tuple(Group(tuple(members)) for members in groups.values())


def _choices(resolved: ResolvedMethod) -> tuple[object, ...]:
    chosen = [(name, value) for name, value in sorted(resolved.params.items()) if not isinstance(value, float)]
    facts = [(s.name, s.over(resolved.params), s.needed(resolved.params)) for s in resolved.method.statistics]
    return resolved.method.name, repr(chosen), repr(facts)


def find_statistics(streams: Streams, group: Group, budget: Budget, advance: Callable[[int], None]) -> Found:
    """Find all statistics of a group, in the order in which the method declares them."""
    found: Found = {tensor.name: {} for tensor in group.tensors}
    for statistic in group.method.needed_statistics():
        cells = group.cells(statistic)
        search = _Search(streams, {t.name: _method_of(t) for t in group.tensors}, statistic, found)
        for cell, values in zip(cells, list(_find(search, cells, budget, advance)), strict=True):
            for tensor, value in zip(cell, values, strict=True):
                found[tensor.name][statistic.name] = value
    return found


@dataclass(frozen=True)
class _Search:
    """One statistic to find, the methods by tensor, and the statistics found before it."""

    streams: Streams
    methods: Mapping[str, ResolvedMethod]
    statistic: Statistic
    found: Found

    def slab(self, piece: Piece) -> Slab:
        resolved = self.methods[piece.tensor]
        inputs, _ = self.streams.inputs(piece, resolved.method.space)
        uniforms = self.streams.uniforms(piece) if resolved.method.random else None
        weights = self.streams.weights[piece.tensor]
        return Slab(inputs, weights, resolved.params, self.found[piece.tensor], uniforms)


def _find(
    search: _Search, cells: Sequence[Sequence[TensorPlan]], budget: Budget, advance: Callable[[int], None]
) -> Iterable[list[torch.Tensor]]:
    """Give what each tensor of each cell gets: a single cell with its slabs in parallel, many of them side by side."""

    def slabs_in_parallel(function: Callable[[Piece], Any], parts: Sequence[Piece]) -> Iterable[Any]:
        return metered(function, parts, budget, lambda piece: advance(piece.stop - piece.start))

    def one(cell: Sequence[TensorPlan], mapper: Mapper = map) -> list[torch.Tensor]:
        parts = [piece for tensor in cell for piece in pieces(tensor.name, tensor.size, budget.slab)]
        if isinstance(search.statistic, Select):
            return _select(search, search.statistic, cell, parts, mapper)
        return [_sum(search, search.statistic, parts, mapper)] * len(cell)

    if len(cells) == 1:
        return [one(cells[0], slabs_in_parallel)]
    return metered(
        one, cells, budget, lambda cell: advance(_passes(search.statistic, cell) * sum(tensor.size for tensor in cell))
    )


def _select(
    search: _Search, statistic: Select, cell: Sequence[TensorPlan], parts: Sequence[Piece], mapper: Mapper
) -> list[torch.Tensor]:
    """Find the threshold of each tensor over the whole cell; tensors with the same k share theirs."""
    size, n = sum(tensor.size for tensor in cell), len(search.streams.names)
    counts = _counts(statistic, cell)
    ranks = sorted({count for count in counts if count < size})
    limits = {count: torch.zeros(n) for count in counts}
    if ranks:
        rows = select_ranks(parts, lambda piece: statistic.of(search.slab(piece)), [ranks] * n, mapper)
        for at, rank in enumerate(ranks):
            limits[rank] = torch.tensor([row[at].value for row in rows])
    return [limits[count] for count in counts]


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
