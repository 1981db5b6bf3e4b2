"""The statistics that methods declare, found by sweeps before slabs are combined."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mediator_cli.checkpoint.blocks import BLOCK
from mediator_cli.engine.matrices import as_seen, parts_of
from mediator_cli.engine.select import Ranked, select, select_signed
from mediator_cli.engine.streams import Piece
from mediator_cli.engine.sweep import all_of, sum_sweep
from mediator_cli.methods.statistics import Position, Select, Slab, Sum

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from mediator_cli.engine.streams import Inputs, Streams
    from mediator_cli.engine.sweep import Search, Source
    from mediator_cli.kernels.arrays import Floats
    from mediator_cli.methods.method import ResolvedMethod
    from mediator_cli.methods.statistics import Params, Statistic
    from mediator_cli.plan.model import TensorPlan

_ROWS_AT_ONCE = 48
"""Rows of all experts that are ranked side by side: each has counters of up to 1.5 MB."""
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
        return len(_turns(needed, len(self.tensors[0].weights)))

    def whole_passes(self) -> int:
        """How many of these passes see whole matrices."""
        needed = [s for s in self.method.needed_statistics() if isinstance(s, Select | Sum) and s.whole]
        return len(_rounds(needed))

    def _is_trivial(self, statistic: Statistic) -> bool:
        if not isinstance(statistic, Select):
            return isinstance(statistic, Position)
        cells = self.cells(statistic)
        return all(min(min(_counts(statistic, cell))) >= _size(cell) + statistic.smallest for cell in cells)

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


def _counts(statistic: Select, cell: Sequence[TensorPlan], sizes: Sequence[int] = ()) -> list[tuple[int, ...]]:
    """Give the k of each tensor of a cell for each row; the number of entries is that of the whole cell."""
    each = zip(cell, sizes or [_size(cell)] * len(cell), strict=True)
    return [tuple(statistic.count(params, size) for params in _params(statistic, tensor)) for tensor, size in each]


def _params(statistic: Select, tensor: TensorPlan) -> list[Params]:
    """Give the parameters of each row that is ranked: one of all inputs together, or one for each of them."""
    resolved, n = method_of(tensor), len(tensor.weights)
    if statistic.joint:
        return [resolved.params]
    return [resolved.params_of(at) for at in range(n)] if resolved.own else [resolved.params] * n


def group_by_method(tensors: Iterable[TensorPlan]) -> tuple[Group, ...]:
    """Gather tensors that are not empty by method and all that is no number, in the order of their first tensor."""
    groups: dict[tuple[object, ...], list[TensorPlan]] = {}
    for tensor in tensors:
        if tensor.average is not None and tensor.size:
            groups.setdefault((*_choices(tensor.average), len(tensor.weights)), []).append(tensor)
    return tuple(Group(tuple(members)) for members in groups.values())


def _choices(resolved: ResolvedMethod) -> tuple[object, ...]:
    chosen = [(name, value) for name, value in sorted(resolved.params.items()) if not isinstance(value, float)]
    facts = [(s.name, s.over(resolved.params), s.needed(resolved.params)) for s in resolved.method.statistics]
    return resolved.method.name, repr(chosen), repr(facts)


@dataclass(frozen=True, eq=False)
class _Reading:
    """How slabs of tensors are read for their methods, with the statistics found so far."""

    streams: Streams
    tensors: Mapping[str, TensorPlan]
    found: Found
    slab: int

    @property
    def source(self) -> Source:
        space = method_of(next(iter(self.tensors.values()))).space
        return self.streams.deltas if space == "delta" else self.streams.tensors

    def parts(self, cell: Sequence[TensorPlan], whole: bool) -> list[Piece]:
        return parts_of(cell, self.slab, frozenset() if whole else frozenset(self.tensors))

    def seen(self, piece: Piece, inputs: Inputs, whole: bool) -> Slab:
        # Statistics that are found side by side look at the same slab.
        if (self, whole) not in inputs.memo:
            inputs.memo[self, whole] = self._seen(piece, inputs, whole)
        seen: Slab = inputs.memo[self, whole]
        return seen

    def _seen(self, piece: Piece, inputs: Inputs, whole: bool) -> Slab:
        tensor = self.tensors[piece.tensor]
        resolved = method_of(tensor)
        uniforms = self.streams.uniforms(piece) if resolved.method.random else None
        statistics = of_piece(self.streams, tensor, piece, self.found[piece.tensor])
        rows = inputs.rows
        if whole:
            rows, uniforms = as_seen(tensor, rows), None if uniforms is None else as_seen(tensor, uniforms)
        return Slab(rows, self.streams.weights[piece.tensor], resolved.params, statistics, uniforms)


def of_piece(
    streams: Streams, tensor: TensorPlan, piece: Piece, found: Mapping[str, NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    """Give the statistics of a slab: what was found for its tensor, where it lies, what its entries get from rows."""
    places = [s.name for s in method_of(tensor).method.statistics if isinstance(s, Position) and s.name in found]
    moved = {name: found[name] + np.array([piece.start, 0]) for name in places}
    return {**found, **moved, **_moments(streams, tensor, piece), **in_rows(streams, tensor, piece)}


def _moments(streams: Streams, tensor: TensorPlan, piece: Piece) -> dict[str, NDArray[Any]]:
    is_needed = method_of(tensor).method.needs_moments and streams.second_moments
    return {"moments": streams.moments(piece)} if is_needed else {}


def in_rows(streams: Streams, tensor: TensorPlan, piece: Piece) -> dict[str, NDArray[Any]]:
    """Find what the entries of a slab get from the whole rows in which they lie; arrays [n, m] by name."""
    resolved = method_of(tensor)
    if not resolved.needs_rows:
        return {}
    length = resolved.row_length(tensor.shape[-1] if tensor.shape else 1)
    first, last = piece.start // length * length, min(-(-piece.stop // length) * length, tensor.size)
    inputs = streams.inputs(Piece(piece.tensor, first, last), resolved.space)
    window = slice(piece.start - first, piece.stop - first)
    found = resolved.find_in_rows(inputs.rows, length, inputs.base)
    return {name: np.ascontiguousarray(value[:, window]) for name, value in found.items()}


def find_statistics(streams: Streams, group: Group, slab: int) -> Search[Found]:
    """Find all statistics of a group, in the order in which the method declares them."""
    tensors = {tensor.name: tensor for tensor in group.tensors}
    reading = _Reading(streams, tensors, {name: {} for name in tensors}, slab)
    needed, n = group.method.needed_statistics(), len(group.tensors[0].weights)
    for some in _turns(needed, n):
        cells = [group.cells(statistic) for statistic in some]
        step = max(1, _ROWS_AT_ONCE // (n * len(some)))
        for start in range(0, max(map(len, cells)), step):
            few = [(s, each[start : start + step]) for s, each in zip(some, cells, strict=True)]
            yield from all_of([_find(reading, statistic, each) for statistic, each in few if each])
    return reading.found


def passes_of(method: ResolvedMethod, n: int) -> int:
    """Count how often the sources of n experts are read to merge one tensor: for each round of statistics, and once."""
    return 1 + len(_turns([each for each in method.needed_statistics() if not isinstance(each, Position)], n))


def _turns(needed: Sequence[Statistic], n: int) -> list[list[Statistic]]:
    """Order statistics of n inputs by rounds, each as often as it has to be found."""
    return _rounds([turn for statistic in needed for turn in _in_turn(statistic, n)])


def _rounds(statistics: Sequence[Statistic]) -> list[list[Statistic]]:
    """Put those that rank the same side by side; all others may need what was found before."""
    rounds: list[list[Statistic]] = []
    for statistic in statistics:
        if rounds and statistic not in rounds[-1] and _ranks_same(statistic, rounds[-1][-1]):
            rounds[-1].append(statistic)
        else:
            rounds.append([statistic])
    return rounds


def _ranks_same(one: Statistic, other: Statistic) -> bool:
    if not isinstance(one, Select) or not isinstance(other, Select):
        return False
    return one.of is other.of and one.among is None and other.among is None


def _in_turn(statistic: Statistic, n: int) -> list[Statistic]:
    """Repeat a statistic of n inputs as often as it has to be found."""
    return [statistic] * (max(1, statistic.rounds(n)) if isinstance(statistic, Select) else 1)


def _find(reading: _Reading, statistic: Statistic, cells: Sequence[Sequence[TensorPlan]]) -> Search[None]:
    if isinstance(statistic, Select):
        results = yield from all_of([_thresholds(reading, statistic, cell) for cell in cells])
    elif isinstance(statistic, Position):
        results = [_places(cell) for cell in cells]
    else:
        results = yield from _sums(reading, statistic, cells)
    for cell, values in zip(cells, results, strict=True):
        for tensor, value in zip(cell, values, strict=True):
            reading.found[tensor.name][statistic.name] = value


def _places(cell: Sequence[TensorPlan]) -> list[NDArray[Any]]:
    """Count the entries before each tensor of a cell, and those of all."""
    ends = np.cumsum([tensor.size for tensor in cell], dtype=np.int64)
    return [np.array([end - tensor.size, ends[-1]]) for end, tensor in zip(ends, cell, strict=True)]


def _thresholds(reading: _Reading, statistic: Select, cell: Sequence[TensorPlan]) -> Search[list[NDArray[Any]]]:
    """Find the threshold of each tensor over the whole cell; tensors with the same k share theirs."""
    n = 1 if statistic.joint else len(cell[0].weights)
    counts, size = _counts(statistic, cell), _size(cell)
    if statistic.among is not None:
        counted = [int(reading.found[tensor.name][statistic.among][0]) for tensor in cell]
        counts = _counts(statistic, cell, counted)
        size = counted[0] if statistic.whole else size
    known = {count for each in counts for count in each}
    limits = {count: np.full(n, 0.0 if count else np.inf, np.float32) for count in known}
    ranks = sorted({count for count in known if 0 < count < size + statistic.smallest})
    if ranks:

        def ranked(piece: Piece, inputs: Inputs) -> Floats:
            return statistic.of(reading.seen(piece, inputs, statistic.whole))

        entries = size if statistic.whole else None
        stream = Ranked(reading.source, reading.parts(cell, statistic.whole), ranked, n, entries)
        rows = yield from (select_signed if statistic.signed else select)(stream, [ranks] * n)
        for at, rank in enumerate(ranks):
            limits[rank] = np.array([row[at].value for row in rows], np.float32)
    return [np.array([limits[count][at] for at, count in enumerate(each)], np.float32) for each in counts]


def _sums(reading: _Reading, statistic: Sum, cells: Sequence[Sequence[TensorPlan]]) -> Search[list[list[NDArray[Any]]]]:
    """Sum a statistic over each tensor, then over the tensors of each cell in their order."""
    tensors = [tensor for cell in cells for tensor in cell]
    shape = statistic.shape(len(tensors[0].weights))
    width = int(np.prod(shape))

    def values(piece: Piece, inputs: Inputs) -> NDArray[np.float64]:
        slab = reading.seen(piece, inputs, statistic.whole)
        blocks = _cut(slab) if slab.inputs.ndim == 2 else [slab]
        return np.stack([statistic.block(block).reshape(width) for block in blocks])

    sizes = {tensor.name: tensor.size for tensor in tensors}
    parts = reading.parts(tensors, statistic.whole)
    ((sums,),) = yield [sum_sweep(reading.source, sizes, parts, width, values)]
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
