"""The file of one sparse expert: a safetensors file whose arrays are appended and whose header comes last.

Sizes are known only when all is encoded, so room for the header is reserved and padded with spaces, as the format
allows. What the arrays mean stands in README.md beside this file.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from mediator_cli.bundle.sparse import (
    ALIGNMENT,
    IndexCodec,
    ValueCodec,
    decode_gaps,
    decode_values,
    padded,
    unpack_bits,
)
from mediator_cli.checkpoint.header import FLOAT_DTYPES, TensorInfo, read_header
from mediator_cli.checkpoint.read import TORCH_DTYPES, bytes_view, open_files, read_slab
from mediator_cli.checkpoint.write import NewTensor, header_bytes, write_error
from mediator_cli.errors import BundleError, Problem

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path
    from typing import BinaryIO

FORMAT = "mediator.sparse"
FORMAT_VERSION = "1"
_DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_ARRAYS = ("values", "gaps", "bitmap", "override_index", "override_values")
_STORED_AS = {"fp32": "F32", "bf16": "BF16", "fp16": "F16", "int8": "I8", "sign": "U8"}
_Count = Annotated[int, Field(ge=0)]


class SparseTensor(BaseModel):
    """What the file's metadata says of one tensor."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shape: tuple[_Count, ...]
    n_kept: _Count
    index: IndexCodec
    values: ValueCodec
    scale: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    n_overrides: _Count = 0


@dataclass
class SparseFileWriter:
    """A sparse expert's file while it is written: arrays go to the end, entries are noted for the header."""

    file: Path
    stream: BinaryIO
    reserved: int
    expert: str
    arrays: list[NewTensor] = field(default_factory=list)
    tensors: dict[str, SparseTensor] = field(default_factory=dict)

    def append(self, parts: Iterable[torch.Tensor], name: str, dtype: torch.dtype, fill: int = 0) -> None:
        """Write parts [k₁], [k₂], … as one array, padded with `fill` to a multiple of 8 bytes."""
        count = 0
        for part in parts:
            self.write(part)
            count += part.numel()
        tail = padded(torch.zeros(count % 8, dtype=dtype), fill)[count % 8 :]
        self.write(tail)
        self.arrays.append(NewTensor(name, _DTYPE_NAMES[dtype], (count + tail.numel(),)))

    def write(self, part: torch.Tensor) -> None:
        """Append raw bytes; raise OutputError when the disk refuses."""
        try:
            self.stream.write(bytes_view(part.contiguous()))
        except OSError as error:
            raise write_error(self.file, error) from None

    def finish(self) -> None:
        """Write the header into the room that was reserved for it."""
        specs = {name: spec.model_dump(exclude_defaults=True) for name, spec in self.tensors.items()}
        metadata = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "expert": self.expert,
            "tensors": json.dumps(specs, separators=(",", ":")),
        }
        head = header_bytes(self.arrays, metadata, self.reserved)
        if len(head) != self.reserved:
            raise RuntimeError(f"header of {len(head)} bytes, {self.reserved} reserved")
        try:
            self.stream.seek(0)
            self.stream.write(head)
            self.stream.flush()
        except OSError as error:
            raise write_error(self.file, error) from None


def reserve_bytes(names: Iterable[str]) -> int:
    """Bound the header of a sparse file over these tensors; a multiple of 8."""
    total = HEADER_BYTES + sum(entry_bytes(name) for name in names)
    return -(-total // ALIGNMENT) * ALIGNMENT


HEADER_BYTES = 1024
"""Room in a header for what is no tensor's."""


def entry_bytes(name: str) -> int:
    """Bound what one tensor takes of the header."""
    per_array, per_spec, length = 128, 256, len(json.dumps(name))
    return len(_ARRAYS) * (length + per_array) + 2 * length + per_spec


def start_sparse_file(file: Path, stream: BinaryIO, expert: str, names: Iterable[str]) -> SparseFileWriter:
    """Reserve the header of a new file and return its writer."""
    reserved = reserve_bytes(names)
    writer = SparseFileWriter(file, stream, reserved, expert)
    writer.write(torch.zeros(reserved, dtype=torch.uint8))
    return writer


@dataclass(frozen=True)
class SparseDelta:
    """One sparse expert's tensor, decoded: values [k] at flat positions [k], exact tensors at overrides."""

    shape: tuple[int, ...]
    positions: torch.Tensor
    values: torch.Tensor
    override_positions: torch.Tensor
    override_values: torch.Tensor | None

    def add_to(self, dense: torch.Tensor, weight: float = 1.0) -> torch.Tensor:
        """Add weight · delta to a dense tensor in float32 and round once to its dtype.

        At weight 1, the mixture of this expert alone, overrides replace what rounding would have changed.
        """
        # Entries that the expert does not touch keep their bits, so only the others pass through float32.
        mixed = dense.flatten().clone()
        positions, values = self.positions.to(dense.device), self.values.to(dense.device)
        mixed[positions] = (mixed[positions].float() + values * weight).to(dense.dtype)
        if weight == 1.0 and self.override_values is not None:
            mixed[self.override_positions.to(dense.device)] = self.override_values.to(dense.device, dense.dtype)
        return mixed.view(dense.shape)


def mix_deltas(dense: torch.Tensor, deltas: Sequence[tuple[SparseDelta, float]]) -> torch.Tensor:
    """Build dense + Σ weight · delta: summed in float32 in this order, rounded once to the dtype of `dense`."""
    if len(deltas) == 1:
        delta, weight = deltas[0]
        return delta.add_to(dense, weight)
    mixed = dense.flatten().to(torch.float32, copy=True)
    for delta, weight in deltas:
        mixed.index_add_(0, delta.positions.to(dense.device), delta.values.to(dense.device) * weight)
    return mixed.to(dense.dtype).view(dense.shape)


@dataclass(frozen=True)
class SparseFile:
    """A sparse expert's file, opened: specs and where the arrays lie."""

    file: Path
    expert: str
    tensors: Mapping[str, SparseTensor]
    arrays: Mapping[str, TensorInfo]

    def read(self, name: str) -> SparseDelta:
        """Decode one tensor; raise BundleError when its arrays do not fit its specification."""
        spec = self.tensors[name]
        size = math.prod(spec.shape)
        positions = self._positions(name, spec, size)
        stored = self._array(f"{name}.values", (_STORED_AS[spec.values],))
        if spec.values == "sign":
            stored = unpack_bits(stored, spec.n_kept) if len(stored) * 8 >= spec.n_kept else stored
        overrides = self._overrides(name, spec)
        values = decode_values(stored[: spec.n_kept], spec.values, spec.scale)
        if len(positions) != spec.n_kept or len(stored) < spec.n_kept:
            raise self._fault(name, f"{len(positions)} positions and {len(stored)} values, not {spec.n_kept}")
        if any(len(p) and int(p.max()) >= size for p in (positions, overrides[0])):
            raise self._fault(name, f"a position lies beyond its {size} entries")
        return SparseDelta(spec.shape, positions, values, *overrides)

    def _positions(self, name: str, spec: SparseTensor, size: int) -> torch.Tensor:
        index = self._array(f"{name}.{spec.index}", ("U8",))
        if spec.index == "gaps":
            return decode_gaps(index)
        if len(index) * 8 < size:
            raise self._fault(name, f"a bitmap of {len(index)} bytes, not of {size} entries")
        return torch.nonzero(unpack_bits(index, size)).flatten()

    def _overrides(self, name: str, spec: SparseTensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not spec.n_overrides:
            return torch.empty(0, dtype=torch.int64), None
        index = self._array(f"{name}.override_index", ("I64",))[: spec.n_overrides]
        values = self._array(f"{name}.override_values", FLOAT_DTYPES)[: spec.n_overrides]
        if len(index) != spec.n_overrides or len(values) != spec.n_overrides or int(index.min()) < 0:
            raise self._fault(name, "overrides do not fit their count")
        return index, values

    def _array(self, name: str, dtypes: Sequence[str]) -> torch.Tensor:
        info = self.arrays.get(name)
        if info is None or info.dtype not in dtypes:
            raise self._fault(name, "array is missing" if info is None else f"array of dtype {info.dtype}")
        with open_files([self.file]) as descriptors:
            return read_slab(descriptors, info, 0, info.size)

    def _fault(self, name: str, message: str) -> BundleError:
        return BundleError(Problem(f"{self.file}: {name}", message, "the bundle is damaged; fetch it or merge again"))


def open_sparse_file(file: Path) -> SparseFile:
    """Open the file of a sparse expert: header only."""
    header = read_header(file)
    if header.metadata.get("format") != FORMAT or header.metadata.get("version") != FORMAT_VERSION:
        hint = f"expected {FORMAT} version {FORMAT_VERSION}; was it written by a newer mediator?"
        raise BundleError(Problem(str(file), "is not a sparse expert that this version reads", hint))
    try:
        specs: dict[str, Any] = json.loads(header.metadata["tensors"])
        tensors = {name: SparseTensor.model_validate(spec) for name, spec in specs.items()}
    except (KeyError, ValueError, AttributeError, RecursionError) as error:
        raise BundleError(Problem(str(file), f"broken metadata: {error}", "fetch the bundle again")) from None
    return SparseFile(file, header.metadata.get("expert", ""), tensors, {info.name: info for info in header.tensors})
