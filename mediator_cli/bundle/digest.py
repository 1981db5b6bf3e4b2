"""Digests of what lies on disk: tensors, weight files and sparse experts. What they are stands in README.md."""

from __future__ import annotations

import os
import struct
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from mediator_cli.checkpoint.blocks import BLOCK
from mediator_cli.checkpoint.digest import digest_blocks, fold, fold_file
from mediator_cli.checkpoint.header import DTYPE_BYTES, FLOAT_DTYPES, read_header, read_start
from mediator_cli.checkpoint.read import STORED_DTYPES, open_files, read_into, widen

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
    from pathlib import Path
    from typing import Any

    from numpy.typing import NDArray

    from mediator_cli.bundle.sparse_file import SparseFile
    from mediator_cli.checkpoint.header import TensorInfo
    from mediator_cli.checkpoint.read import Handle
    from mediator_cli.kernels.arrays import Floats

T = TypeVar("T")
R = TypeVar("R")

_STEP = 4 * BLOCK
"""Elements that a thread reads at a time: few enough to stay in its cache."""
_RUN = 32 * _STEP
"""Elements that a thread takes from the list at a time."""


@dataclass(frozen=True)
class Scan:
    """What one pass over a tensor's bytes finds; all that are no floats count as finite."""

    digest: str
    is_finite: bool


def unheard(n: int) -> None:
    """Take no note of bytes that were read."""


def scan_tensors(
    tensors: Sequence[TensorInfo], workers: int = 0, advance: Callable[[int], None] = unheard, *, finite: bool = True
) -> list[Scan]:
    """Read all bytes of tensors with some threads, one a core for 0; `finite` looks for NaN and infinity as well.

    `advance` is told of the bytes read. Raises CheckpointError when a file cannot be read or ends early.
    """
    runs = [(at, start) for at, info in enumerate(tensors) for start in range(0, info.size, _RUN)]
    parts: list[list[_Part]] = [[] for _ in tensors]
    with open_files(info.file for info in tensors) as descriptors:

        def one(run: tuple[int, int]) -> _Part:
            return _scan_run(descriptors, tensors[run[0]], run[1], finite)

        # All threads end before the files are closed, whatever ends the loop.
        with closing(in_threads(one, runs, workers)) as found:
            for (at, start), part in zip(runs, found, strict=True):
                parts[at].append(part)
                advance(min(_RUN, tensors[at].size - start) * DTYPE_BYTES[tensors[at].dtype])
    return [Scan(fold(part.digests for part in each), all(part.is_finite for part in each)) for each in parts]


@dataclass(frozen=True)
class _Part:
    """Of a run of whole blocks: their digests, joined, and whether all entries are finite."""

    digests: bytes
    is_finite: bool


def _scan_run(descriptors: Mapping[Path, Handle], info: TensorInfo, start: int, finite: bool) -> _Part:
    stop, width = min(start + _RUN, info.size), DTYPE_BYTES[info.dtype]
    looks = finite and info.dtype in FLOAT_DTYPES
    stored = np.empty(min(_STEP, stop - start), STORED_DTYPES.get(info.dtype, f"u{width}"))
    floats = np.empty(len(stored) if looks else 0, np.float32)
    digests, is_finite = bytearray(), True
    for at in range(start, stop, _STEP):
        part = stored[: stop - at]
        read_into(descriptors, info, at * width, part)
        digests += digest_blocks(part)
        is_finite &= not looks or _is_finite(part, info.dtype, floats[: len(part)])
    return _Part(bytes(digests), is_finite)


def _is_finite(stored: NDArray[Any], dtype: str, out: Floats) -> bool:
    # A float64 may be finite and yet too large for float32.
    return bool(np.isfinite(stored).all()) if dtype == "F64" else widen(stored, dtype, out)


def in_threads(function: Callable[[T], R], items: Sequence[T], workers: int = 0) -> Generator[R, None, None]:
    """Call a function for every item from some threads, one a core for 0; give the results in the order of items.

    An error or an interrupt ends all, after the calls in flight.
    """
    if len(items) < 2 or workers == 1:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(workers or os.cpu_count())
    try:
        yield from pool.map(function, items)
    finally:
        pool.shutdown(cancel_futures=True)


def digest_tensors(
    tensors: Mapping[str, TensorInfo], workers: int = 0, advance: Callable[[int], None] = unheard
) -> dict[str, str]:
    """Digest tensors as they lie on disk, as `scan_tensors` does."""
    scans = scan_tensors(list(tensors.values()), workers, advance, finite=False)
    return {name: scan.digest for name, scan in zip(tensors, scans, strict=True)}


def file_digest(file: Path, tensors: Mapping[str, str]) -> str:
    """Digest a safetensors file by the digests of all its arrays; reads the header alone.

    Raises CheckpointError when the header is broken.
    """
    header = read_header(file)
    return fold_file(read_start(file, header.data_start), (tensors[info.name] for info in header.tensors))


def sparse_digests(sparse: SparseFile, arrays: Mapping[str, str] | None = None) -> dict[str, str]:
    """Digest each tensor of a sparse expert's file by the digests of its arrays, which are read if not given.

    Raises BundleError when an array is missing.
    """
    known = digest_tensors(sparse.arrays) if arrays is None else arrays
    return {
        name: fold_sparse((known[info.name] for info in sorted(sparse.places(name).values(), key=_start)), spec.scale)
        for name, spec in sparse.tensors.items()
    }


def _start(info: TensorInfo) -> int:
    return info.start


def fold_sparse(arrays: Iterable[str], scale: float) -> str:
    """Fold the digests of a sparse tensor's arrays, in the order in which they lie, and the scale, which is in none."""
    return fold([*map(bytes.fromhex, arrays), struct.pack("<d", scale)])
