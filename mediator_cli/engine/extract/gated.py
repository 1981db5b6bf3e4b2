"""Experts that are not stored sparsely: all of them are read together, slab by slab, and written in one pass."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mediator_cli.bundle.sparse import decode_values, encode_values, pack_bits
from mediator_cli.bundle.sparse_file import SHARED, STORED_AS, SparseTensor
from mediator_cli.checkpoint.blocks import BLOCK
from mediator_cli.checkpoint.header import DTYPE_BYTES
from mediator_cli.engine.extract.encode import Kept, Stored
from mediator_cli.engine.extract.item import Item
from mediator_cli.engine.extract.measure import Measured
from mediator_cli.engine.pool import Stopped, run_all
from mediator_cli.engine.streams import pieces
from mediator_cli.kernels.sparse import sum_magnitudes, sum_squares
from mediator_cli.kernels.storage import inner_products
from mediator_cli.stages.storage import (
    agrees,
    best_directions,
    elect_task_vector,
    is_not_negative,
    is_own,
    mean_and_directions,
    rebuild,
    scale_of,
    sum_rows,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from mediator_cli.bundle.sparse_writer import SparseFileWriter
    from mediator_cli.engine.extract.item import Extraction
    from mediator_cli.engine.streams import Piece
    from mediator_cli.kernels.arrays import Doubles, Flags, Floats
    from mediator_cli.plan.model import ResolvedExtract, TensorPlan

Scales = dict[tuple[str, str], float]
"""The scales of EMR-Merging, by expert and tensor: the same for all tensors of an expert."""


@dataclass(frozen=True)
class Joint:
    """One tensor of all experts."""

    job: Extraction
    tensor: TensorPlan

    def slabs(self) -> Iterator[tuple[Piece, Floats]]:
        """Read the deltas [n, m] of all experts, slab by slab."""
        for piece in pieces(self.tensor.name, self.tensor.size, self.job.slab):
            if self.job.stop.is_set():
                raise Stopped
            rows = np.empty((len(self.job.experts), piece.size), np.float32)
            for name, row in zip(self.job.experts, rows, strict=True):
                row[:] = Item(self.job, name, self.tensor).part(piece).delta
            yield piece, rows


def common_scales(
    job: Extraction, tensors: Sequence[TensorPlan], workers: int, advance: Callable[[int], None]
) -> Scales:
    """Find the scales of EMR-Merging, which are over all of these tensors of an expert."""
    sums: dict[str, Doubles] = {}

    def look(tensor: TensorPlan) -> None:
        sums[tensor.name] = _magnitudes(Joint(job, tensor))
        advance(tensor.size)

    run_all(look, sorted(tensors, key=lambda tensor: -tensor.size), workers, stop=job.stop)
    found: Scales = {}
    for at, name in enumerate(job.experts):
        for over in dict.fromkeys(tensor.extract.scale for tensor in tensors):
            scale = scale_of(*(_total(tensors, sums, at, side, over) for side in (0, 1)))
            found |= {(name, tensor.name): scale for tensor in tensors if tensor.extract.scale == over}
    return found


def _total(tensors: Sequence[TensorPlan], sums: Mapping[str, Doubles], at: int, side: int, over: str | None) -> float:
    each = ((sums[tensor.name][at, side], tensor.size) for tensor in tensors)
    return math.fsum(total / size if over == "tensors" else total for total, size in each)


def _magnitudes(joint: Joint) -> Doubles:
    """Sum |delta| and |elected task vector behind the gate| of each expert; [n, 2]."""
    totals = np.zeros((len(joint.job.experts), 2))
    for _, rows in joint.slabs():
        elected = elect_task_vector(rows)
        for row, total in zip(rows, totals, strict=True):
            gated = np.where(agrees(row, elected), elected, np.float32(0))
            total[:] = _added(total[0], sum_magnitudes, row), _added(total[1], sum_magnitudes, gated)
    return totals


def _added(before: float, function: Callable[[Floats], float], values: Floats) -> float:
    """Add what each block of a slab comes to, one by one, so that the sum is the same for any slabs."""
    total = before
    for start in range(0, len(values), BLOCK):
        total += function(values[start : start + BLOCK])
    return total


@dataclass
class GatedCoder:
    """One tensor of all experts on its way to its places in the files of experts and of what they share.

    `places` are those of each file's arrays; `scales` those of EMR-Merging, by expert.
    """

    joint: Joint
    writers: Mapping[str, SparseFileWriter]
    places: Mapping[str, Mapping[str, int]]
    scales: Mapping[str, float]
    coefficients: dict[str, Doubles] = field(default_factory=dict)

    @property
    def extract(self) -> ResolvedExtract:
        """How the tensor is stored."""
        return self.joint.tensor.extract

    def encode(self) -> dict[str, Kept]:
        """Write the shared arrays, gates and coefficients; return what each expert keeps."""
        self.coefficients = self._find_coefficients()
        tallies = {name: _Tally() for name in self.joint.job.experts}
        for piece, rows in self.joint.slabs():
            whole = _share(self.extract, rows, np.array([*self.coefficients.values()]))
            stored = self._write_shared(piece, whole)
            for (name, tally), row in zip(tallies.items(), rows, strict=True):
                flags = _gate(self.extract, row, whole)
                if flags is not None:
                    self._write_bits(name, piece, flags)
                tally.add(row, flags, self._rebuilt(name, flags, stored))
        for name, coefficients in self.coefficients.items():
            if self.extract.n_shared:
                self.writers[name].write(self.places[name]["coefficients"], coefficients)
        return {name: self._settle(name, tally) for name, tally in tallies.items()}

    def _find_coefficients(self) -> dict[str, Doubles]:
        names = self.joint.job.experts
        if self.extract.mode != "basis":
            return {name: np.array([self.scales.get(name, 1.0)]) for name in names}
        gram = np.zeros((len(names), len(names)))
        for _, rows in self.joint.slabs():
            for start in range(0, rows.shape[1], BLOCK):
                gram += inner_products(rows[:, start : start + BLOCK])
        found = best_directions(gram, self.extract.n_shared - 1)
        # A plan asks for fewer directions than there are experts; whoever asks for more gets zeros.
        spare = np.zeros((len(names), self.extract.n_shared - 1 - found.shape[1]))
        return {name: np.array([1.0, *row]) for name, row in zip(names, np.hstack([found, spare]), strict=True)}

    def _write_shared(self, piece: Piece, shared: Floats | None) -> Floats | None:
        """Write a slab of the shared arrays [k, m]; give it back as a reader will read it."""
        if shared is None:
            return None
        codec, start = self.extract.values, self.places[SHARED]["values"]
        width = DTYPE_BYTES[STORED_AS[codec]]
        again = np.empty_like(shared)
        for at, array in enumerate(shared):
            stored = encode_values(array, codec, 1.0)
            self.writers[SHARED].write(start + (at * self.joint.tensor.size + piece.start) * width, stored)
            again[at] = decode_values(stored, codec, 1.0)
        return again

    def _write_bits(self, name: str, piece: Piece, flags: Flags) -> None:
        kind = "values" if self.extract.mode == "sign" else "bitmap"
        self.writers[name].write(self.places[name][kind] + piece.start // 8, pack_bits(flags))

    def _rebuilt(self, name: str, flags: Flags | None, shared: Floats | None) -> Floats | None:
        if shared is None:
            return None
        values = rebuild(shared, self.coefficients[name])
        return values if flags is None else np.where(flags, values, np.float32(0))

    def _settle(self, name: str, tally: _Tally) -> Kept:
        size = self.joint.tensor.size
        if self.extract.mode == "sign":
            tally.error = max(0.0, tally.energy - tally.magnitude**2 / size)
            self.writers[name].settle(self.joint.tensor.name, size, tally.magnitude / size)
            return Kept(size, 0, tally.energy, tally.error)
        n_kept = tally.n_kept if self.extract.has_bits else size
        self.writers[name].settle(self.joint.tensor.name, n_kept, 1.0)
        return Kept(n_kept, 0, tally.energy, tally.error)


@dataclass
class _Tally:
    """What one expert's tensor comes to: bits set, squared norm of the delta and of the error, sum of magnitudes."""

    n_kept: int = 0
    energy: float = 0.0
    error: float = 0.0
    magnitude: float = 0.0

    def add(self, row: Floats, flags: Flags | None, rebuilt: Floats | None) -> None:
        """Add a slab [m]; `rebuilt` None where that needs the sum of magnitudes first."""
        self.energy = _added(self.energy, sum_squares, row)
        if flags is not None:
            self.n_kept += int(np.count_nonzero(flags))
        if rebuilt is None:
            self.magnitude = _added(self.magnitude, sum_magnitudes, row)
        else:
            self.error = _added(self.error, sum_squares, row - rebuilt)


def _share(extract: ResolvedExtract, rows: Floats, coefficients: Doubles) -> Floats | None:
    """Compute the arrays that experts share [k, m] from their deltas [n, m]; None for signs."""
    if extract.mode == "emr":
        return elect_task_vector(rows)[None]
    if extract.mode == "tall_mask":
        return sum_rows(rows)[None]
    return mean_and_directions(rows, coefficients[:, 1:]) if extract.mode == "basis" else None


def _gate(extract: ResolvedExtract, row: Floats, shared: Floats | None) -> Flags | None:
    """Decide the gate of one expert [m] by the shared array before it is rounded for storage; None without a gate."""
    if shared is None:
        return is_not_negative(row)
    if extract.mode == "emr":
        return agrees(row, shared[0])
    return is_own(row, shared[0], extract.mask_lambda or 0.0) if extract.mode == "tall_mask" else None


def extract_gated(
    job: Extraction,
    tensors: Sequence[TensorPlan],
    writers: Mapping[str, SparseFileWriter],
    scales: Scales,
    workers: int,
    advance: Callable[[int], None],
) -> dict[str, dict[str, dict[str, Any]]]:
    """Append tensors that are not stored sparsely to the files of all experts, and of what they share.

    Gives what stands there, for the journal, by file and tensor. Files are the same for any workers.
    """
    coders = [_placed(job, tensor, writers, scales) for tensor in tensors if tensor.size]
    kept: dict[str, dict[str, Kept]] = {}

    def encode(coder: GatedCoder) -> None:
        tensor = coder.joint.tensor
        kept[tensor.name] = coder.encode()
        advance(tensor.size * len(job.experts))

    run_all(encode, sorted(coders, key=lambda coder: -coder.joint.tensor.size), workers, stop=job.stop)
    found: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in writers}
    for coder in coders:
        for name in coder.places:
            found[name][coder.joint.tensor.name] = _as_json(coder, name, kept[coder.joint.tensor.name].get(name))
    return found


def _as_json(coder: GatedCoder, name: str, kept: Kept | None) -> dict[str, Any]:
    spec = coder.writers[name].tensors[coder.joint.tensor.name]
    return Stored(Measured(spec, _index_bytes(spec)), kept or Kept(0, 0, 0.0, 0.0)).as_json()


def _placed(job: Extraction, tensor: TensorPlan, writers: Mapping[str, SparseFileWriter], scales: Scales) -> GatedCoder:
    specs = dict.fromkeys(job.experts, _expert_spec(tensor))
    if tensor.extract.n_shared:
        shape = (tensor.extract.n_shared, *tensor.shape)
        specs[SHARED] = SparseTensor(shape=shape, n_kept=math.prod(shape), index="all", values=tensor.extract.values)
    places = {
        name: writers[name].place(tensor.name, spec, tensor.dtype, _index_bytes(spec)) for name, spec in specs.items()
    }
    own = {name: scales[name, tensor.name] for name in job.experts if (name, tensor.name) in scales}
    return GatedCoder(Joint(job, tensor), writers, places, own)


def _expert_spec(tensor: TensorPlan) -> SparseTensor:
    """Say how an expert is stored before it is known how many entries its gate lets through, and its scale."""
    if tensor.extract.mode == "sign":
        return SparseTensor(shape=tensor.shape, n_kept=tensor.size, index="all", values="sign")
    index: Literal["bitmap", "all"] = "bitmap" if tensor.extract.has_bits else "all"
    n_shared = tensor.extract.n_shared
    return SparseTensor(shape=tensor.shape, n_kept=tensor.size, index=index, values="shared", n_shared=n_shared)


def _index_bytes(spec: SparseTensor) -> int:
    return -(-spec.size // 8) if spec.index == "bitmap" else 0
