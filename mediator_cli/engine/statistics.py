"""The statistics that methods declare, found by sweeps before slabs are combined."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mediator_cli.checkpoint.blocks import BLOCK
from mediator_cli.engine.select import Ranked, select
from mediator_cli.engine.streams import Piece, cut
from mediator_cli.engine.sweep import all_of, sum_sweep
from mediator_cli.methods.registry import Select, Slab, inputs_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from mediator_cli.engine.streams import Inputs, Streams
    from mediator_cli.engine.sweep import Search, Source
    from mediator_cli.kernels.arrays import Floats
    from mediator_cli.methods.registry import ResolvedMethod, Statistic, Sum
    from mediator_cli.plan.model import TensorPlan

Found = dict[str, dict[str, "NDArray[Any]"]]
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
        return method_of(self.tensors[0])

    @property
    def spans_model(self) -> bool:
        """Whether a statistic is taken over all tensors, so that it has to be known before the first is merged."""
        method = self.method
        return any(statistic.over(method.params) == "model" for statistic in method.needed_statistics())

    def passes(self) -> int:
        """How often all slabs are read to find the statistics, if samples do not lead astray."""
        needed = [statistic for statistic in self.method.needed_statistics() if not self._is_trivial(statistic)]
        return len(_rounds(needed))

    def _is_trivial(self, statistic: Statistic) -> bool:
        if not isinstance(statistic, Select):
            return False
        cells = self.cells(statistic)
        return all(min(_counts(statistic, cell)) >= _size(cell) for cell in cells)

    def cells(self, statistic: Statistic) -> list[tuple[TensorPlan, ...]]:
        """Gather the tensors over which a statistic is taken: all, or each by itself."""
        over = statistic.over(self.method.params)
        return [self.tensors] if over == "model" else [(tensor,) for tensor in self.tensors]


def method_of(tensor: TensorPlan) -> ResolvedMethod:
    """Return the method that merges a tensor."""
    if tensor.average is None:
        raise ValueError(f"{tensor.name} is not merged")
    return tensor.average


def _size(cell: Sequence[TensorPlan]) -> int:
    return sum(tensor.size for tensor in cell)


def _counts(statistic: Select, cell: Sequence[TensorPlan]) -> list[int]:
    """Give the k of each tensor of a cell; the number of entries is that of the whole cell."""
    size = _size(cell)
    return [statistic.count(method_of(tensor).params, size) for tensor in cell]


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


@dataclass(frozen=True)
class _Reading:
    """How slabs of tensors are read for their methods, with the statistics found so far."""

    streams: Streams
    tensors: Mapping[str, TensorPlan]
    found: Found
    slab: int

    @property
    def source(self) -> Source:
        space = method_of(next(iter(self.tensors.values()))).method.space
        return self.streams.deltas if space == "delta" else self.streams.tensors

    def parts(self, cell: Sequence[TensorPlan]) -> list[Piece]:
        return cut([(tensor.name, tensor.size) for tensor in cell], self.slab)

    def seen(self, piece: Piece, inputs: Inputs) -> Slab:
        tensor = self.tensors[piece.tensor]
        resolved = method_of(tensor)
        uniforms = self.streams.uniforms(piece) if resolved.method.random else None
        statistics = {**self.found[piece.tensor], **in_rows(self.streams, tensor, piece)}
        return Slab(inputs.rows, self.streams.weights[piece.tensor], resolved.params, statistics, uniforms)


def in_rows(streams: Streams, tensor: TensorPlan, piece: Piece) -> dict[str, NDArray[Any]]:
    """Find what the entries of a slab get from the whole rows in which they lie; arrays [n, m] by name."""
    resolved = method_of(tensor)
    if not resolved.needs_rows:
        return {}
    length = tensor.shape[-1] if tensor.shape else 1
    first, last = piece.start // length * length, -(-piece.stop // length) * length
    rows = streams.inputs(Piece(piece.tensor, first, last), resolved.method.space).rows
    window = slice(piece.start - first, piece.stop - first)
    found = resolved.find_in_rows(rows, length)
    return {name: np.ascontiguousarray(value[:, window]) for name, value in found.items()}


def find_statistics(streams: Streams, group: Group, slab: int) -> Search[Found]:
    """Find all statistics of a group, in the order in which the method declares them."""
    tensors = {tensor.name: tensor for tensor in group.tensors}
    reading = _Reading(streams, tensors, {name: {} for name in tensors}, slab)
    for some in _rounds(group.method.needed_statistics()):
        yield from all_of([_find(reading, statistic, group.cells(statistic)) for statistic in some])
    return reading.found


def _rounds(statistics: Sequence[Statistic]) -> list[list[Statistic]]:
    """Put those that rank the inputs as they are side by side; all others may need what was found before."""
    rounds: list[list[Statistic]] = []
    for statistic in statistics:
        if rounds and all(map(_ranks_inputs, [statistic, *rounds[-1]])):
            rounds[-1].append(statistic)
        else:
            rounds.append([statistic])
    return rounds


def _ranks_inputs(statistic: Statistic) -> bool:
    return isinstance(statistic, Select) and statistic.of is inputs_of and statistic.among is None


def _find(reading: _Reading, statistic: Statistic, cells: Sequence[Sequence[TensorPlan]]) -> Search[None]:
    if isinstance(statistic, Select):
        results = yield from all_of([_thresholds(reading, statistic, cell) for cell in cells])
    else:
        results = yield from _sums(reading, statistic, cells)
    for cell, values in zip(cells, results, strict=True):
        for tensor, value in zip(cell, values, strict=True):
            reading.found[tensor.name][statistic.name] = value


def _thresholds(reading: _Reading, statistic: Select, cell: Sequence[TensorPlan]) -> Search[list[NDArray[Any]]]:
    """Find the threshold of each tensor over the whole cell; tensors with the same k share theirs."""
    n = 1 if statistic.joint else len(reading.streams.names)
    counts = _counts(statistic, cell)
    if statistic.among is not None:
        counted = [int(reading.found[tensor.name][statistic.among][0]) for tensor in cell]
        counts = [statistic.count(method_of(t).params, size) for t, size in zip(cell, counted, strict=True)]
    limits = {count: np.full(n, 0.0 if count else np.inf, np.float32) for count in counts}
    ranks = sorted({count for count in counts if 0 < count < _size(cell)})
    if ranks:

        def ranked(piece: Piece, inputs: Inputs) -> Floats:
            return statistic.of(reading.seen(piece, inputs))

        rows = yield from select(Ranked(reading.source, reading.parts(cell), ranked, n), [ranks] * n)
        for at, rank in enumerate(ranks):
            limits[rank] = np.array([row[at].value for row in rows], np.float32)
    return [limits[count] for count in counts]


def _sums(reading: _Reading, statistic: Sum, cells: Sequence[Sequence[TensorPlan]]) -> Search[list[list[NDArray[Any]]]]:
    """Sum a statistic over each tensor, then over the tensors of each cell in their order."""
    tensors = [tensor for cell in cells for tensor in cell]
    shape = statistic.shape(len(reading.streams.names))
    width = int(np.prod(shape))

    def values(piece: Piece, inputs: Inputs) -> NDArray[np.float64]:
        blocks = _cut(reading.seen(piece, inputs))
        return np.stack([statistic.block(block).reshape(width) for block in blocks])

    sizes = {tensor.name: tensor.size for tensor in tensors}
    ((sums,),) = yield [sum_sweep(reading.source, sizes, reading.parts(tensors), width, values)]
    by_tensor = dict(zip(sizes, sums, strict=True))
    return [[_added([by_tensor[tensor.name] for tensor in cell]).reshape(shape)] * len(cell) for cell in cells]


def _added(rows: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    total = np.zeros_like(rows[0])
    for row in rows:
        total += row
    return total


def _cut(slab: Slab) -> Iterator[Slab]:
    size = slab.inputs.shape[1]
    for start in range(0, size, BLOCK):
        window = slice(start, min(start + BLOCK, size))
        uniforms = None if slab.uniforms is None else slab.uniforms[:, window]
        # A statistic of each entry goes with its entries.
        shape = slab.inputs.shape
        statistics = {name: v[:, window] if v.shape == shape else v for name, v in slab.statistics.items()}
        yield Slab(slab.inputs[:, window], slab.weights, slab.params, statistics, uniforms)
