"""Tensors from disk, slab by slab: a slab is elements `start` to `stop` of a flattened tensor."""

from __future__ import annotations

import os
from bisect import bisect_right
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mediator_cli.checkpoint.header import CHECK_DISK, unreadable
from mediator_cli.checkpoint.remote.folder import remote_file
from mediator_cli.checkpoint.remote.handle import open_remote
from mediator_cli.errors import CheckpointError, Problem
from mediator_cli.kernels.arrays import bytes_of
from mediator_cli.kernels.floats import is_finite, narrow_bf16, narrow_f16, widen_bf16, widen_f16

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from mediator_cli.checkpoint.digest import Digests
    from mediator_cli.checkpoint.header import TensorInfo
    from mediator_cli.checkpoint.remote.folder import RemoteFile
    from mediator_cli.checkpoint.spans import Layout, Part
    from mediator_cli.kernels.arrays import Bytes, Floats

STORED_DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_), "U8": np.dtype(np.uint8), "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16), "I16": np.dtype(np.int16), "F16": np.dtype(np.uint16), "BF16": np.dtype(np.uint16),
    "U32": np.dtype(np.uint32), "I32": np.dtype(np.int32), "F32": np.dtype(np.float32),
    "U64": np.dtype(np.uint64), "I64": np.dtype(np.int64), "F64": np.dtype(np.float64),
}  # fmt: skip
"""The numpy dtype of stored elements; F16 and BF16 are their bit patterns."""


class Handle(Protocol):
    """A file that is open for reading, from any thread."""

    def read_into(self, offset: int, view: memoryview, span: tuple[int, int]) -> int:
        """Fill a view with the bytes from `offset`, or its start; gives how many. `span` is that of the tensor."""
        ...


@dataclass(frozen=True, slots=True)
class LocalHandle:
    """A file on disk."""

    descriptor: int

    def read_into(self, offset: int, view: memoryview, span: tuple[int, int]) -> int:
        """Fill a view with the bytes from `offset`, or its start; gives how many."""
        return os.preadv(self.descriptor, [view], offset)


@contextmanager
def open_files(files: Iterable[Path]) -> Iterator[dict[Path, Handle]]:
    """Open each file once for reading; gives handles by path, closed at the end.

    Raises CheckpointError for a file that is not there; at the end also for one at a URL that was changed meanwhile.
    """
    with ExitStack() as stack:
        handles: dict[Path, Handle] = {}
        far: dict[Path, RemoteFile] = {}
        for file in dict.fromkeys(files):
            try:
                descriptor = os.open(file, os.O_RDONLY)
            except OSError as error:
                if (remote := remote_file(file)) is None:
                    raise unreadable(file, error, CHECK_DISK) from None
                far[file] = remote
                continue
            stack.callback(os.close, descriptor)
            handles[file] = LocalHandle(descriptor)
        yield handles | stack.enter_context(open_remote(far)) if far else handles


def read_into(handles: Mapping[Path, Handle], info: TensorInfo, first: int, array: NDArray[Any]) -> None:
    """Fill a contiguous array with a tensor's bytes from byte `first`; raise CheckpointError when they end early."""
    view = bytes_of(array)
    done = 0
    while done < len(view):
        try:
            count = handles[info.file].read_into(info.start + first + done, view[done:], (info.start, info.end))
        except OSError as error:
            raise unreadable(info.file, error, CHECK_DISK) from None
        if count == 0:
            message = "the file ends before its last tensor"
            raise CheckpointError(Problem(f"{info.file}: {info.name}", message, "did another process change it?"))
        done += count


def read_bytes(descriptors: Mapping[Path, Handle], info: TensorInfo, first: int, last: int) -> Bytes:
    """Read bytes `first` to `last` of a tensor into a new array [last - first]."""
    array = np.empty(last - first, np.uint8)
    read_into(descriptors, info, first, array)
    return array


def read_slab(descriptors: Mapping[Path, Handle], info: TensorInfo, start: int, stop: int) -> NDArray[Any]:
    """Read a slab as it is stored [stop - start]; see STORED_DTYPES."""
    array = np.empty(stop - start, STORED_DTYPES[info.dtype])
    read_into(descriptors, info, start * array.itemsize, array)
    return array


def widen(stored: NDArray[Any], dtype: str, out: Floats) -> bool:
    """Turn stored elements [m] of a dtype such as BF16 into float32 [m]; tell whether all are finite."""
    if dtype == "BF16":
        return widen_bf16(stored, out)
    if dtype == "F16":
        return widen_f16(stored, out)
    # What is too large for float32 is told by the answer; numpy's warning would only say it again.
    with np.errstate(all="ignore"):
        out[:] = stored
    return is_finite(out)


def narrow(values: Floats, dtype: str) -> tuple[NDArray[Any], bool]:
    """Round float32 [m] once to what is stored of a dtype; tell whether all results are finite."""
    if dtype not in ("BF16", "F16"):
        return values.astype(STORED_DTYPES[dtype], copy=False), is_finite(values)
    out = np.empty(len(values), np.uint16)
    return out, (narrow_bf16 if dtype == "BF16" else narrow_f16)(values, out)


class Reader(Protocol):
    """Gives slabs of named tensors."""

    def read_into(self, name: str, start: int, stop: int, out: Floats) -> bool:
        """Fill `out` [stop - start] with one slab in float32; tell whether all entries are finite."""
        ...


def read_floats(reader: Reader, name: str, start: int, stop: int) -> Floats:
    """Read one slab into a new float32 array [stop - start]."""
    out = np.empty(stop - start, np.float32)
    reader.read_into(name, start, stop, out)
    return out


@dataclass(frozen=True)
class FullReader:
    """Reads the slabs of a full checkpoint in float32; `digests` take note of what passes by."""

    descriptors: Mapping[Path, Handle]
    tensors: Mapping[str, TensorInfo]
    digests: Digests | None = None

    def read_into(self, name: str, start: int, stop: int, out: Floats) -> bool:
        """Fill `out` [stop - start] with one slab in float32; tell whether all entries are finite."""
        info = self.tensors[name]
        stored = out if info.dtype == "F32" else np.empty(stop - start, STORED_DTYPES[info.dtype])
        read_into(self.descriptors, info, start * stored.itemsize, stored)
        if self.digests is not None:
            self.digests.note(info, start, stored)
        return is_finite(out) if stored is out else widen(stored, info.dtype, out)


@dataclass(frozen=True)
class MappedReader:
    """Reads tensors that are made of runs of other tensors, as a layout says; all others from the source `own`."""

    own: str
    readers: Mapping[str, Reader]
    layout: Layout

    @cached_property
    def _ends(self) -> dict[str, list[int]]:
        return {name: list(accumulate(span.size for span in spans)) for name, spans in self.layout.items()}

    def read_into(self, name: str, start: int, stop: int, out: Floats) -> bool:
        """Fill `out` [stop - start] with one slab in float32; tell whether all entries are finite."""
        if name not in self.layout:
            return self.readers[self.own].read_into(name, start, stop, out)
        spans, ends = self.layout[name], self._ends[name]
        is_whole, at, index = True, start, bisect_right(ends, start)
        while at < stop:
            span, end = spans[index], min(ends[index], stop)
            is_whole &= self._mean(span.parts, at - (ends[index] - span.size), out[at - start : end - start])
            at, index = end, index + 1
        return is_whole

    def _mean(self, parts: tuple[Part, ...], offset: int, out: Floats) -> bool:
        if not parts:
            out[:] = 0
            return True
        if len(parts) == 1:
            return self._part(parts[0], offset, out)
        # The mean of several is taken in float64, so that their order hardly matters.
        rows = np.empty((len(parts), len(out)), np.float32)
        is_whole = all([self._part(part, offset, row) for part, row in zip(parts, rows, strict=True)])
        with np.errstate(all="ignore"):
            out[:] = rows.astype(np.float64).mean(axis=0)
        return is_whole

    def _part(self, part: Part, offset: int, out: Floats) -> bool:
        first = part.start + offset
        return self.readers[part.source].read_into(part.tensor, first, first + len(out), out)
