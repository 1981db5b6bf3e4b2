"""Encode a sparse tensor into the places that are reserved for it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from mediator_cli.bundle.sparse import ESCAPE, decode_values, encode_values, pack_bits
from mediator_cli.checkpoint.blocks import BLOCK
from mediator_cli.engine.extract.choose import slabs
from mediator_cli.engine.extract.measure import find_overrides
from mediator_cli.kernels.arrays import bytes_of
from mediator_cli.kernels.sparse import square_sums, write_gaps

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from mediator_cli.bundle.sparse_file import SparseTensor
    from mediator_cli.bundle.sparse_writer import SparseFileWriter
    from mediator_cli.engine.extract.choose import Limit, Slab
    from mediator_cli.engine.extract.item import Item
    from mediator_cli.engine.extract.measure import Measured
    from mediator_cli.kernels.arrays import Bytes, Flags

_BUFFER = 1 << 20
"""Bytes that gather before they are written."""


@dataclass(frozen=True)
class Kept:
    """What a sparse expert keeps of one tensor: entries, squared norm of the delta and of the error."""

    n_kept: int
    n_overrides: int
    energy: float
    error: float


@dataclass(frozen=True)
class Stored:
    """A tensor of an expert in its file, and what it keeps."""

    measured: Measured
    kept: Kept

    def as_json(self) -> dict[str, Any]:
        """Write it as JSON can hold it."""
        spec = self.measured.spec.model_dump(mode="json")
        return {"spec": spec, "n_index": self.measured.n_index, "kept": asdict(self.kept)}


@dataclass
class _Tail:
    """Bytes that are written one behind the other, from an offset on."""

    writer: SparseFileWriter
    offset: int
    data: bytearray = field(default_factory=bytearray)

    def add(self, array: NDArray[Any]) -> None:
        self.data += bytes_of(array)
        if len(self.data) >= _BUFFER:
            self.flush()

    def flush(self) -> None:
        self.writer.write(self.offset, np.frombuffer(bytes(self.data), np.uint8))
        self.offset += len(self.data)
        self.data.clear()


@dataclass
class Coder:
    """One tensor of one expert on its way to its places in the file."""

    item: Item
    spec: SparseTensor
    writer: SparseFileWriter
    places: Mapping[str, int]
    position: int = 0
    rest: Flags = field(default_factory=lambda: np.empty(0, np.bool_))

    def encode(self, limit: Limit) -> Kept:
        """Write values, index and overrides; return what is kept."""
        tails = {name: _Tail(self.writer, offset) for name, offset in self.places.items()}
        squares = np.zeros(2, np.float64)
        factor, codec = self.item.tensor.extract.rescale, self.item.tensor.extract.values
        for slab in slabs(self.item, limit):
            stored = encode_values(slab.gather(factor), codec, self.spec.scale)
            self._add_values(tails["values"], stored)
            tails[self.spec.index].add(self._index(slab))
            # Rescaled values are meant to overshoot; what is kept is judged before.
            decoded = decode_values(stored, codec, self.spec.scale)
            for block in square_sums(slab.part.delta, slab.places, slab.bounds, decoded, 1.0 / factor, BLOCK):
                squares += block
            if self.spec.n_overrides:
                wrong, right = find_overrides(self.item, slab)
                tails["override_index"].add(wrong)
                tails["override_values"].add(right)
        if len(self.rest):
            tails["values"].add(pack_bits(self.rest))
        for tail in tails.values():
            tail.flush()
        return Kept(self.spec.n_kept, self.spec.n_overrides, *squares.tolist())

    def _add_values(self, tail: _Tail, stored: NDArray[Any]) -> None:
        if self.spec.values != "sign":
            tail.add(stored)
            return
        # Eight signs make a byte, across slabs too.
        bits = np.concatenate([self.rest, stored])
        whole = len(bits) // 8 * 8
        tail.add(pack_bits(bits[:whole]))
        self.rest = bits[whole:]

    def _index(self, slab: Slab) -> Bytes:
        if self.spec.index == "bitmap":
            return pack_bits(slab.mask)
        most = len(slab.places) + (slab.piece.stop - self.position) // ESCAPE
        out = np.empty(most, np.uint8)
        n_bytes, self.position = write_gaps(slab.places, slab.piece.start, self.position, out)
        return out[:n_bytes]
