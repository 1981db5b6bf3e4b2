"""Write the file of a sparse expert in any order, from several threads: places first, bytes later, the header last."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mediator_cli.bundle.sparse import ALIGNMENT, ESCAPE, aligned
from mediator_cli.bundle.sparse_file import (
    FORMAT,
    STORED_AS,
    ArrayKind,
    SparseTensor,
    reserve_bytes,
    version_of,
)
from mediator_cli.checkpoint.header import DTYPE_BYTES
from mediator_cli.checkpoint.write import NewTensor, header_bytes, write_at, write_error
from mediator_cli.errors import OutputError, Problem

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType
    from typing import Any, Self

    from numpy.typing import NDArray


class _NewArray(NamedTuple):
    """An array that will be written: `n_bytes` of it, then padding."""

    kind: ArrayKind
    dtype: str
    n_bytes: int

    @property
    def padding(self) -> bytes:
        """What stands behind the array, so that the next one is aligned."""
        return bytes([ESCAPE if self.kind == "gaps" else 0]) * (-self.n_bytes % ALIGNMENT)

    def named(self, tensor: str) -> NewTensor:
        """Describe it for the header, padding included."""
        n_entries = aligned(self.n_bytes) // DTYPE_BYTES[self.dtype]
        return NewTensor(f"{tensor}.{self.kind}", self.dtype, (n_entries,))


def _new_arrays(spec: SparseTensor, dtype: str, n_index: int) -> Iterator[_NewArray]:
    if spec.values == "factors":
        yield _NewArray("a", dtype, spec.rank * spec.shape[1] * DTYPE_BYTES[dtype])
        yield _NewArray("b", dtype, spec.shape[0] * spec.rank * DTYPE_BYTES[dtype])
        return
    if spec.values == "shared":
        yield _NewArray("coefficients", "F64", spec.n_shared * DTYPE_BYTES["F64"])
    else:
        stored = STORED_AS[spec.values]
        n_values = -(-spec.n_kept // 8) if spec.values == "sign" else spec.n_kept * DTYPE_BYTES[stored]
        yield _NewArray("values", stored, n_values)
    if spec.index != "all":
        yield _NewArray(spec.index, "U8", n_index)
    if spec.n_overrides:
        yield _NewArray("override_index", "I64", spec.n_overrides * DTYPE_BYTES["I64"])
        yield _NewArray("override_values", dtype, spec.n_overrides * DTYPE_BYTES[dtype])


@dataclass
class SparseFileWriter:
    """A sparse expert's file while it is written: places of arrays first, then their bytes, the header last.

    `place` and `finish` are for one thread at a time, `write` for any. Leaving the context closes the file.
    """

    file: Path
    expert: str
    reserved: int
    descriptor: int
    end: int
    arrays: list[NewTensor] = field(default_factory=list)
    tensors: dict[str, SparseTensor] = field(default_factory=dict)

    def place(self, name: str, spec: SparseTensor, dtype: str, n_index: int) -> dict[str, int]:
        """Append the arrays of one tensor; give where each begins in the file, by kind.

        `n_index` are the bytes of gaps or bitmap, `dtype` is that of the dense tensor, such as BF16. The file grows
        and gets the padding. Raises OutputError when the disk has no room.
        """
        start = self.end
        places = self._note(name, spec, dtype, n_index)
        self._grow(start)
        for array, at in places:
            self.write(at + array.n_bytes, np.frombuffer(array.padding, np.uint8))
        return {array.kind: at for array, at in places}

    def settle(self, name: str, n_kept: int, scale: float) -> SparseTensor:
        """Say what is only known when a tensor without a list of positions is written; give what its header says."""
        spec = self.tensors[name].model_copy(update={"n_kept": n_kept, "scale": scale})
        self.tensors[name] = spec
        return spec

    def _note(self, name: str, spec: SparseTensor, dtype: str, n_index: int) -> list[tuple[_NewArray, int]]:
        """Give a tensor its place behind all others, in the header to come too."""
        arrays = list(_new_arrays(spec, dtype, n_index))
        *starts, self.end = accumulate((aligned(array.n_bytes) for array in arrays), initial=self.end)
        self.arrays += [array.named(name) for array in arrays]
        self.tensors[name] = spec
        return list(zip(arrays, starts, strict=True))

    def _grow(self, start: int) -> None:
        if start == self.end:
            return
        try:
            os.posix_fallocate(self.descriptor, start, self.end - start)
        except OSError as error:
            raise write_error(self.file, error) from None

    def _cut(self) -> None:
        """Let the file end where the last tensor that was noted ends."""
        try:
            if os.fstat(self.descriptor).st_size < self.end:
                message = "is shorter than what was written of it"
                raise OutputError(Problem(str(self.file), message, "remove it and merge again"))
            os.ftruncate(self.descriptor, self.end)
        except OSError as error:
            raise write_error(self.file, error) from None

    def write(self, offset: int, array: NDArray[Any]) -> None:
        """Write the bytes of an array at an offset in the file; raise OutputError when the disk refuses."""
        write_at(self.descriptor, self.file, np.ascontiguousarray(array).view(np.uint8).data, offset)

    def sync(self) -> None:
        """Wait until the disk has all that was written."""
        try:
            os.fdatasync(self.descriptor)
        except OSError as error:
            raise write_error(self.file, error) from None

    def finish(self) -> None:
        """Write the header into the room that was reserved for it, and close the file."""
        specs = {name: spec.model_dump(exclude_defaults=True) for name, spec in self.tensors.items()}
        metadata = {
            "format": FORMAT,
            "version": version_of(self.tensors.values()),
            "expert": self.expert,
            "tensors": json.dumps(specs, separators=(",", ":")),
        }
        head = header_bytes(self.arrays, metadata, self.reserved)
        if len(head) != self.reserved:
            raise RuntimeError(f"header of {len(head)} bytes, {self.reserved} reserved")
        write_at(self.descriptor, self.file, memoryview(head), 0)
        self.close()

    def close(self) -> None:
        """Close the file as it is, finished or not; a second time changes nothing."""
        descriptor, self.descriptor = self.descriptor, -1
        try:
            if descriptor >= 0:
                os.close(descriptor)
        except OSError as error:
            raise write_error(self.file, error) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def create_sparse_file(file: Path, expert: str, names: Sequence[str]) -> SparseFileWriter:
    """Create a file with room for the header of these tensors; raise OutputError when the disk refuses."""
    with ExitStack() as opened:
        writer = opened.enter_context(_open_writer(file, expert, names, os.O_CREAT | os.O_EXCL))
        writer._grow(0)
        opened.pop_all()
    return writer


def resume_sparse_file(
    file: Path,
    expert: str,
    names: Sequence[str],
    tensors: Mapping[str, SparseTensor],
    dtypes: Mapping[str, str],
    n_index: Mapping[str, int],
) -> SparseFileWriter:
    """Take up a file without header after these tensors, in this order, were placed; what lies behind them goes.

    Raises OutputError when the file is shorter than that or cannot be opened.
    """
    with ExitStack() as opened:
        writer = opened.enter_context(_open_writer(file, expert, names, 0))
        for name, spec in tensors.items():
            writer._note(name, spec, dtypes[name], n_index[name])
        writer._cut()
        opened.pop_all()
    return writer


def _open_writer(file: Path, expert: str, names: Sequence[str], flags: int) -> SparseFileWriter:
    reserved = reserve_bytes(names)
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CLOEXEC | flags, 0o666)
    except OSError as error:
        raise write_error(file, error) from None
    return SparseFileWriter(file, expert, reserved, descriptor, reserved)
