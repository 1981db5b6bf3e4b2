"""Safetensors files whose header is known before the first tensor: sized in advance, written in place."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mediator_cli.checkpoint.header import DTYPE_BYTES, TensorInfo
from mediator_cli.errors import OutputError, Problem

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

_NO_SPACE = "free some space or choose another output folder"


@dataclass(frozen=True)
class NewTensor:
    """A tensor that will be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """Number of bytes in the file."""
        n = DTYPE_BYTES[self.dtype]
        for side in self.shape:
            n *= side
        return n


def header_bytes(tensors: Sequence[NewTensor], metadata: Mapping[str, str], reserve: int = 0) -> bytes:
    """Write length and header of a safetensors file with the tensors in this order.

    The header is padded with spaces to a multiple of 8, and to `reserve` bytes in all where that is more.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for tensor in tensors:
        span = [offset, offset + tensor.n_bytes]
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": span}
        offset = span[1]
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    length = max(-(-len(text) // 8) * 8, reserve - 8)
    return length.to_bytes(8, "little") + text.ljust(length)


def plan_shards(tensors: Sequence[NewTensor], shard_size: int, n_more: int = 0) -> dict[str, tuple[NewTensor, ...]]:
    """Share tensors among files of at most `shard_size` bytes, in order; a larger tensor gets a file of its own.

    Inside a file wider dtypes come first, which keeps every tensor aligned. Names count `n_more` files behind these.
    """
    shards: list[list[NewTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.n_bytes > shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.n_bytes
    total = len(shards) + n_more
    names = [shard_name(n, total) for n in range(1, len(shards) + 1)]
    return {
        name: tuple(sorted(shard, key=lambda tensor: -DTYPE_BYTES[tensor.dtype]))
        for name, shard in zip(names, shards, strict=True)
    }


def shard_name(number: int, total: int) -> str:
    """Name one of so many files of weights, counted from 1.

    >>> shard_name(2, 3), shard_name(1, 1)
    ('model-00002-of-00003.safetensors', 'model.safetensors')
    """
    return "model.safetensors" if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors"


def create_file(file: Path, tensors: Sequence[NewTensor], metadata: Mapping[str, str]) -> dict[str, TensorInfo]:
    """Create a file of its final size with its header written; return where each tensor goes.

    Raises OutputError when the disk has no room.
    """
    head = header_bytes(tensors, metadata)
    infos = place_tensors(file, tensors, metadata)
    n_bytes = max((info.end for info in infos.values()), default=len(head))
    try:
        with file.open("xb") as stream:
            os.posix_fallocate(stream.fileno(), 0, n_bytes)
            stream.write(head)
    except OSError as error:
        raise write_error(file, error) from None
    return infos


def place_tensors(file: Path, tensors: Sequence[NewTensor], metadata: Mapping[str, str]) -> dict[str, TensorInfo]:
    """Say where each tensor goes in a file that is created with the same arguments."""
    infos: dict[str, TensorInfo] = {}
    offset = len(header_bytes(tensors, metadata))
    for tensor in tensors:
        infos[tensor.name] = TensorInfo(tensor.name, tensor.dtype, tensor.shape, file, offset, offset + tensor.n_bytes)
        offset += tensor.n_bytes
    return infos


def write_error(file: Path, error: OSError) -> OutputError:
    """Turn a failed write into an error that says where and what to do."""
    reason = (error.strerror or str(error)).lower()
    return OutputError(Problem(str(file), f"cannot write: {reason}", _NO_SPACE))


def write_at(descriptor: int, file: Path, data: memoryview, offset: int) -> None:
    """Write all bytes at an offset; raise OutputError when that fails."""
    done = 0
    while done < len(data):
        try:
            done += os.pwrite(descriptor, data[done:], offset + done)
        except OSError as error:
            raise write_error(file, error) from None


def sync(path: Path) -> None:
    """Wait until the disk has a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Wait until the disk has a folder with all that is in it."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def index_json(shards: Mapping[str, Sequence[NewTensor]]) -> dict[str, object]:
    """Build the index of a sharded checkpoint."""
    total = sum(tensor.n_bytes for tensor in _all(shards))
    places = {tensor.name: name for name, shard in shards.items() for tensor in shard}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}


def _all(shards: Mapping[str, Sequence[NewTensor]]) -> Iterator[NewTensor]:
    for shard in shards.values():
        yield from shard
