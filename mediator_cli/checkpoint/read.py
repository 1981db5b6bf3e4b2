"""Tensors from disk, slab by slab: a slab is elements `start` to `stop` of a flattened tensor."""

from __future__ import annotations

import os
from bisect import bisect_right
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Protocol

import torch

from mediator_cli.checkpoint.header import CHECK_DISK, unreadable
from mediator_cli.errors import CheckpointError, Problem

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from mediator_cli.checkpoint.header import TensorInfo
    from mediator_cli.checkpoint.spans import Layout, Part

TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
    "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip


@contextmanager
def open_files(files: Iterable[Path]) -> Iterator[dict[Path, int]]:
    """Open each file once for reading; gives descriptors by path, closed at the end."""
    with ExitStack() as stack:
        descriptors: dict[Path, int] = {}
        for file in dict.fromkeys(files):
            try:
                descriptors[file] = os.open(file, os.O_RDONLY)
            except OSError as error:
                raise unreadable(file, error, CHECK_DISK) from None
            stack.callback(os.close, descriptors[file])
        yield descriptors


def bytes_view(tensor: torch.Tensor) -> memoryview:
    """Give the bytes of a contiguous tensor without a copy; writable if the tensor is."""
    return memoryview(tensor.view(torch.uint8).numpy())  # type: ignore[arg-type]  # numpy's stubs hide the buffer


def read_bytes(descriptors: Mapping[Path, int], info: TensorInfo, first: int, last: int) -> torch.Tensor:
    """Read bytes `first` to `last` of a tensor into a new uint8 tensor [last - first]."""
    buffer = torch.empty(last - first, dtype=torch.uint8)
    view = bytes_view(buffer)
    done = 0
    while done < len(view):
        try:
            count = os.preadv(descriptors[info.file], [view[done:]], info.start + first + done)
        except OSError as error:
            raise unreadable(info.file, error, CHECK_DISK) from None
        if count == 0:
            message = "the file ends before its last tensor"
            raise CheckpointError(Problem(f"{info.file}: {info.name}", message, "did another process change it?"))
        done += count
    return buffer


def read_slab(descriptors: Mapping[Path, int], info: TensorInfo, start: int, stop: int) -> torch.Tensor:
    """Read a slab in the tensor's own dtype [stop - start]."""
    dtype = TORCH_DTYPES[info.dtype]
    return read_bytes(descriptors, info, start * dtype.itemsize, stop * dtype.itemsize).view(dtype)


class Reader(Protocol):
    """Gives slabs of named tensors."""

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Read one slab [stop - start] as float32."""
        ...


@dataclass(frozen=True)
class FullReader:
    """Reads the slabs of a full checkpoint in float32."""

    descriptors: Mapping[Path, int]
    tensors: Mapping[str, TensorInfo]

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Read one slab [stop - start] as float32."""
        return read_slab(self.descriptors, self.tensors[name], start, stop).float()


@dataclass(frozen=True)
class MappedReader:
    """Reads tensors that are made of runs of other tensors, as a layout says; all others from the source `own`."""

    own: str
    readers: Mapping[str, Reader]
    layout: Layout

    @cached_property
    def _ends(self) -> dict[str, list[int]]:
        return {name: list(accumulate(span.size for span in spans)) for name, spans in self.layout.items()}

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Read one slab [stop - start] as float32."""
        if name not in self.layout:
            return self.readers[self.own].read(name, start, stop)
        spans, ends = self.layout[name], self._ends[name]
        pieces: list[torch.Tensor] = []
        index = bisect_right(ends, start)
        while start < stop:
            span, end = spans[index], min(ends[index], stop)
            offset = start - (ends[index] - span.size)
            pieces.append(self._mean(span.parts, offset, end - start))
            start, index = end, index + 1
        return torch.cat(pieces) if pieces else torch.zeros(0)

    def _mean(self, parts: tuple[Part, ...], offset: int, size: int) -> torch.Tensor:
        found = [
            self.readers[part.source].read(part.tensor, part.start + offset, part.start + offset + size)
            for part in parts
        ]
        # One part must keep its bits; the mean of several is taken in float64, so that order hardly matters.
        return found[0] if len(found) == 1 else torch.stack(found).double().mean(dim=0).float()
