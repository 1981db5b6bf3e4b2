"""The file of one sparse expert, or a part of it: what its header says, and its tensors decoded.

What the arrays mean stands in README.md beside this file.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from mediator_cli.bundle.manifest import EXPERTS_FOLDER
from mediator_cli.bundle.sparse import (
    StoredIndex,
    StoredValues,
    ValueCodec,
    aligned,
    decode_gaps,
    decode_values,
    unpack_bits,
)
from mediator_cli.checkpoint.header import FLOAT_DTYPES, TensorInfo, read_header
from mediator_cli.checkpoint.read import open_files, read_slab
from mediator_cli.errors import BundleError, Problem
from mediator_cli.kernels.factors import Factors

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from mediator_cli.kernels.arrays import Bytes, Counts, Doubles, Floats

FORMAT = "mediator.sparse"
FORMAT_VERSION = "1"
GATED_VERSION = "2"
"""The version of a file that holds what is not sparse."""
FACTORS_VERSION = "3"
"""The version of a file of low-rank experts."""
SHARED = ""
"""Whose file has the arrays that experts share: no expert has an empty name."""
_SHARED_FILE = "shared"
HEADER_BYTES = 1024
"""Room in a header for what is no tensor's."""
STORED_AS: dict[StoredValues, str] = {"fp32": "F32", "bf16": "BF16", "fp16": "F16", "int8": "I8", "sign": "U8"}
ArrayKind = Literal["values", "gaps", "bitmap", "coefficients", "override_index", "override_values", "a", "b"]
_VERSIONS = (FORMAT_VERSION, GATED_VERSION, FACTORS_VERSION)
_FACTORS: tuple[Literal["a", "b"], ...] = ("a", "b")
_CODECS: dict[str, ValueCodec] = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}
_N_KINDS = 5
_MOST_SIDES = 64
_Count = Annotated[int, Field(ge=0)]


class SparseTensor(BaseModel):
    """What the file's metadata says of one tensor."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shape: Annotated[tuple[_Count, ...], Field(max_length=_MOST_SIDES)]
    n_kept: _Count
    index: StoredIndex
    values: StoredValues
    scale: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    n_overrides: _Count = 0
    n_shared: _Count = 0
    rank: _Count = 0

    @property
    def size(self) -> int:
        """Number of entries of the dense tensor."""
        return math.prod(self.shape)

    @property
    def is_gated(self) -> bool:
        """Whether it is one of the other ways to store all entries of an expert, not sparse; see README.md."""
        return not self.is_low_rank and (self.index == "all" or self.values == "shared")

    @property
    def is_low_rank(self) -> bool:
        """Whether it is stored as two small matrices; see README.md."""
        return self.values == "factors"


@dataclass(frozen=True)
class SparseEntries:
    """One tensor decoded: values [k] at rising flat positions [k].

    `override_values` [j] belong at `override_positions` [j]; they are as stored in `override_dtype`, such as BF16.
    """

    positions: Counts
    values: Floats
    override_positions: Counts
    override_values: NDArray[Any]
    override_dtype: str


@dataclass(frozen=True)
class SparseFile:
    """A sparse expert's file, opened: specifications and where the arrays lie."""

    file: Path
    expert: str
    tensors: Mapping[str, SparseTensor]
    arrays: Mapping[str, TensorInfo]

    def places(self, name: str) -> dict[ArrayKind, TensorInfo]:
        """Find the arrays of one tensor; raise BundleError when one is missing, too short or of another dtype."""
        spec = self.tensors[name]
        found: dict[ArrayKind, TensorInfo] = {}
        if spec.values == "factors":
            return self._factor_places(name, spec)
        if spec.values == "shared":
            found["coefficients"] = self._array(f"{name}.coefficients", ("F64",), spec.n_shared)
        else:
            per_byte = 8 if spec.values == "sign" else 1
            found["values"] = self._array(f"{name}.values", (STORED_AS[spec.values],), -(-spec.n_kept // per_byte))
        if spec.index != "all":
            index_bits = spec.size if spec.index == "bitmap" else 0
            found[spec.index] = self._array(f"{name}.{spec.index}", ("U8",), -(-index_bits // 8))
        if spec.n_overrides:
            found["override_index"] = self._array(f"{name}.override_index", ("I64",), spec.n_overrides)
            found["override_values"] = self._array(f"{name}.override_values", FLOAT_DTYPES, spec.n_overrides)
        return found

    def decode(self, name: str) -> SparseEntries:
        """Decode one tensor; raise BundleError when its arrays do not fit its specification."""
        spec, places = self.tensors[name], self.places(name)
        if spec.index == "all" or spec.values in ("shared", "factors"):
            raise self.fault(name, "is not stored sparsely")
        index = self._read(places[spec.index])
        if spec.index == "gaps":
            positions = decode_gaps(index)
        else:
            positions = np.flatnonzero(unpack_bits(index, spec.size)).astype(np.int64, copy=False)
        if len(positions) != spec.n_kept:
            raise self.fault(name, f"{len(positions)} positions, not {spec.n_kept}")
        if spec.n_kept and positions[-1] >= spec.size:
            raise self.fault(name, f"a position lies beyond its {spec.size} entries")
        return SparseEntries(positions, self._values(places["values"], spec), *self._overrides(name, spec, places))

    def bits(self, name: str) -> Bytes | None:
        """Read the bits of a tensor that is not sparse, packed: its gate, or its signs; None where it has none."""
        spec, places = self.tensors[name], self.places(name)
        info = places.get("bitmap") or (places["values"] if spec.values == "sign" else None)
        return None if info is None else self._read(info, -(-spec.size // 8))

    def coefficients(self, name: str) -> Doubles:
        """Read the coefficients [k] of a tensor whose values are shared; float64."""
        return self._read(self.places(name)["coefficients"], self.tensors[name].n_shared)

    def factors(self, name: str) -> Factors:
        """Read the two matrices of a tensor of low rank; raise BundleError when they do not fit."""
        spec, places = self.tensors[name], self.places(name)
        a, b = (decode_values(self._read(places[kind]), _CODECS[places[kind].dtype], 1.0) for kind in _FACTORS)
        rows, columns = spec.shape
        return Factors(
            a[: spec.rank * columns].reshape(spec.rank, columns),
            b[: rows * spec.rank].reshape(rows, spec.rank),
            spec.scale,
        )

    def stored_values(self, name: str) -> tuple[NDArray[Any], str]:
        """Read the values of a tensor that keeps all entries, as they are stored, with their dtype, such as BF16."""
        info = self.places(name)["values"]
        return self._read(info, self.tensors[name].n_kept), info.dtype

    def _values(self, info: TensorInfo, spec: SparseTensor) -> Floats:
        if spec.values == "shared" or spec.values == "factors":
            raise self.fault(info.name, "is not stored sparsely")
        if spec.values != "sign":
            return decode_values(self._read(info, spec.n_kept), spec.values, spec.scale)
        bits = unpack_bits(self._read(info, -(-spec.n_kept // 8)), spec.n_kept)
        return decode_values(bits, spec.values, spec.scale)

    def _overrides(
        self, name: str, spec: SparseTensor, places: Mapping[ArrayKind, TensorInfo]
    ) -> tuple[Counts, NDArray[Any], str]:
        if not spec.n_overrides:
            return np.empty(0, np.int64), np.empty(0, np.uint8), ""
        index = self._read(places["override_index"], spec.n_overrides)
        if index.min() < 0 or index.max() >= spec.size:
            raise self.fault(name, f"a position lies beyond its {spec.size} entries")
        values = places["override_values"]
        return index, self._read(values, spec.n_overrides), values.dtype

    def _factor_places(self, name: str, spec: SparseTensor) -> dict[ArrayKind, TensorInfo]:
        if len(spec.shape) != 2 or spec.index != "all" or spec.n_overrides:
            raise self.fault(name, "is stored in a way that does not exist")
        sizes = {"a": spec.rank * spec.shape[1], "b": spec.shape[0] * spec.rank}
        return {kind: self._array(f"{name}.{kind}", tuple(_CODECS), sizes[kind]) for kind in _FACTORS}

    def _array(self, name: str, dtypes: Iterable[str], least: int) -> TensorInfo:
        info = self.arrays.get(name)
        if info is None or info.dtype not in dtypes:
            raise self.fault(name, "array is missing" if info is None else f"array of dtype {info.dtype}")
        if info.size < least:
            raise self.fault(name, f"array of {info.size} entries, not {least}")
        return info

    def _read(self, info: TensorInfo, count: int | None = None) -> NDArray[Any]:
        with open_files([self.file]) as descriptors:
            return read_slab(descriptors, info, 0, info.size if count is None else count)

    def fault(self, name: str, message: str) -> BundleError:
        """Make the error of an array or tensor that does not fit."""
        return BundleError(Problem(f"{self.file}: {name}", message, "the bundle is damaged; fetch it or merge again"))


def open_sparse_file(file: Path) -> SparseFile:
    """Open a file of a sparse expert: header only.

    Raises CheckpointError when the header is broken, BundleError when it is no sparse expert's.
    """
    header = read_header(file)
    if header.metadata.get("format") != FORMAT or header.metadata.get("version") not in _VERSIONS:
        hint = f"expected {FORMAT} version {' or '.join(_VERSIONS)}; was it written by a newer mediator?"
        raise BundleError(Problem(str(file), "is not a sparse expert that this version reads", hint))
    try:
        specs: dict[str, Any] = json.loads(header.metadata["tensors"])
        tensors = {name: SparseTensor.model_validate(spec) for name, spec in specs.items()}
    except (KeyError, ValueError, AttributeError, RecursionError) as error:
        raise BundleError(Problem(str(file), f"broken metadata: {error}", "fetch the bundle again")) from None
    if header.metadata["version"] != version_of(tensors.values()):
        message = f"is of version {header.metadata['version']}, which does not fit its tensors"
        raise BundleError(Problem(str(file), message, "fetch the bundle again"))
    return SparseFile(file, header.metadata.get("expert", ""), tensors, {info.name: info for info in header.tensors})


def version_of(tensors: Iterable[SparseTensor]) -> str:
    """Say which version a file with these tensors has: the first one unless something is not stored sparsely."""
    known = tuple(tensors)
    if any(spec.is_low_rank for spec in known):
        return FACTORS_VERSION
    return GATED_VERSION if any(spec.is_gated for spec in known) else FORMAT_VERSION


def sparse_file_name(expert: str, number: int, count: int) -> str:
    """Name a file of a sparse expert, relative to the bundle: the `number`-th, from 1, of `count`.

    SHARED names those of the arrays that experts share.

    >>> sparse_file_name("maths", 1, 1), sparse_file_name("maths", 2, 3)
    ('experts/maths.safetensors', 'experts/maths-00002-of-00003.safetensors')
    """
    part = "" if count == 1 else f"-{number:05d}-of-{count:05d}"
    stem = f"{EXPERTS_FOLDER}/{expert}" if expert != SHARED else _SHARED_FILE
    return f"{stem}{part}.safetensors"


def reserve_bytes(names: Iterable[str]) -> int:
    """Bound the header of a sparse file over these tensors; a multiple of 8."""
    return aligned(HEADER_BYTES + sum(entry_bytes(name) for name in names))


def entry_bytes(name: str) -> int:
    """Bound what one tensor takes of the header."""
    per_array, per_spec, length = 128, 256, len(json.dumps(name))
    return _N_KINDS * (length + per_array) + 2 * length + per_spec
