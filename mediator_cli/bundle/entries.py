"""Check the tensors of sparse experts in bounded memory, without decoding them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mediator_cli.bundle.sparse import ESCAPE, FLOAT_CODECS, INT8_MAX
from mediator_cli.bundle.sparse_file import SHARED
from mediator_cli.checkpoint.read import open_files, read_slab

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from typing import Any

    from numpy.typing import NDArray

    from mediator_cli.bundle.sparse_file import SparseFile, SparseTensor
    from mediator_cli.checkpoint.header import TensorInfo
    from mediator_cli.kernels.arrays import Bytes

_LARGEST = float(np.finfo(np.float32).max)
_STEP = 1 << 20
"""Entries of an array that are read at a time."""


def check_entries(sparse: SparseFile, name: str) -> None:
    """Check forms, counts and positions of one tensor, and its scale.

    Raises BundleError where `SparseFile.decode` would, and where a value is too large for float32. What floats the
    arrays hold is left to the digests' pass.
    """
    spec, places = sparse.tensors[name], sparse.places(name)
    if spec.is_low_rank:
        if abs(spec.scale) > _LARGEST:
            raise sparse.fault(name, "holds NaN or infinite values")
        return
    if spec.is_gated:
        _check_gated(sparse, name)
        return
    listed = places["gaps" if spec.index == "gaps" else "bitmap"]
    index = _slabs(listed, listed.size)
    count, end = _count_gaps(index) if spec.index == "gaps" else _count_bits(index, spec.size)
    if count != spec.n_kept:
        raise sparse.fault(name, f"{count} positions, not {spec.n_kept}")
    overrides = _slabs(places["override_index"], spec.n_overrides) if spec.n_overrides else ()
    if end > spec.size or any(part.min() < 0 or part.max() >= spec.size for part in overrides):
        raise sparse.fault(name, f"a position lies beyond its {spec.size} entries")
    largest = {"int8": INT8_MAX * spec.scale, "sign": spec.scale}.get(spec.values, 0.0)
    if abs(largest) > _LARGEST:
        raise sparse.fault(name, "holds NaN or infinite values")


def _check_gated(sparse: SparseFile, name: str) -> None:
    """Check a tensor that is not stored sparsely: its counts, and that its numbers are finite in float32."""
    spec, places = sparse.tensors[name], sparse.places(name)
    is_empty = spec.values == "shared" and not spec.n_shared
    if spec.n_overrides or spec.values == "int8" or is_empty:
        raise sparse.fault(name, "is stored in a way that does not exist")
    count = spec.size
    if spec.index != "all":
        if spec.index != "bitmap":
            raise sparse.fault(name, "has a gate that is no bitmap")
        count, _ = _count_bits(_slabs(places["bitmap"], places["bitmap"].size), spec.size)
    if count != spec.n_kept:
        raise sparse.fault(name, f"{count} positions, not {spec.n_kept}")
    factors = sparse.coefficients(name) if spec.values == "shared" else np.array([spec.scale])
    if not (np.abs(factors) <= _LARGEST).all():
        raise sparse.fault(name, "holds NaN or infinite values")


def check_shares(sparse: SparseFile, name: str, shared: Mapping[str, SparseTensor]) -> None:
    """Check that a tensor is stored in a way that its file may, and that arrays it gathers from are there and fit."""
    spec = sparse.tensors[name]
    is_whole = spec.index == "all" and spec.values in FLOAT_CODECS
    if is_whole != (sparse.expert == SHARED):
        raise sparse.fault(name, "is stored in a way that does not exist")
    if spec.values != "shared":
        return
    if name not in shared:
        raise sparse.fault(name, "its shared arrays are missing")
    if shared[name].shape != (spec.n_shared, *spec.shape):
        raise sparse.fault(name, f"its shared arrays are {list(shared[name].shape)}, not {spec.n_shared} of its shape")


def _slabs(info: TensorInfo, size: int) -> Iterator[NDArray[Any]]:
    with open_files([info.file]) as descriptors:
        for start in range(0, size, _STEP):
            yield read_slab(descriptors, info, start, min(start + _STEP, size))


def _count_gaps(parts: Iterable[Bytes]) -> tuple[int, int]:
    """Count the entries that gaps keep; give the position behind the last one too."""
    count, position, end = 0, 0, 0
    for codes in parts:
        kept = np.flatnonzero(codes != ESCAPE)
        if len(kept):
            behind = int(kept[-1]) + 1
            end = position + int(codes[:behind].sum(dtype=np.int64)) + len(kept)
        count += len(kept)
        position += int(codes.sum(dtype=np.int64)) + len(kept)
    return count, end


def _count_bits(parts: Iterable[Bytes], size: int) -> tuple[int, int]:
    """Count the bits set among the first `size`; none of them lies beyond."""
    count, left = 0, size
    for packed in parts:
        bits = np.unpackbits(packed, bitorder="little", count=min(left, 8 * len(packed)))
        count += int(np.count_nonzero(bits))
        left -= len(bits)
    return count, 0
