"""Safetensors headers and index files, by the standard library alone where they are on disk.

Everything a file says about itself is checked here, before any tensor is read: a header longer than
the file, overlapping or missing bytes, sizes that do not fit shapes, names that leave their folder.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mediator_cli.checkpoint.remote.folder import remote_file
from mediator_cli.errors import CheckpointError, Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from mediator_cli.checkpoint.remote.folder import RemoteFile

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
FLOAT_DTYPES = ("BF16", "F16", "F32", "F64")
MAX_HEADER_BYTES = 100_000_000
CHECK_DISK = "check the disk and the file's rights"
_DAMAGED = "the file is damaged or was not downloaded completely; fetch it again"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as its header describes it: bytes `start` to `end` of `file`, row-major."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        """Number of bytes."""
        return self.end - self.start


@dataclass(frozen=True)
class Header:
    """The header of one safetensors file; `tensors` in file order."""

    tensors: tuple[TensorInfo, ...]
    metadata: dict[str, str]
    data_start: int


def unreadable(file: Path, error: OSError, hint: str = "check the path and its rights") -> CheckpointError:
    """Turn a failed read into an error that says where and what to do."""
    reason = (error.strerror or "unreadable").lower()
    return CheckpointError(Problem(str(file), f"cannot read: {reason}", hint))


def read_header(file: Path) -> Header:
    """Read and check the header of one safetensors file, on disk or at the URL that its path in the cache stands for.

    Raises CheckpointError naming file and tensor when it breaks the format in any way.
    """
    try:
        with file.open("rb") as stream:

            def read(start: int, n: int) -> bytes:
                stream.seek(start)
                return stream.read(n)

            return parse_header(file, file.stat().st_size, read)
    except OSError as error:
        if (remote := remote_file(file)) is None:
            raise unreadable(file, error) from None
    return _read_remote_header(file, remote)


def _read_remote_header(file: Path, remote: RemoteFile) -> Header:
    def read(start: int, n: int) -> bytes:
        return remote.read_start(start + n)[start:]

    try:
        return parse_header(file, remote.facts.size, read)
    except CheckpointError as error:
        told = [replace(problem, place=problem.place.replace(str(file), remote.url)) for problem in error.problems]
        raise CheckpointError(told) from None


def read_start(file: Path, n_bytes: int) -> bytes:
    """Read the first bytes of a weight file, such as its header, wherever it lies; raise CheckpointError if not."""
    try:
        with file.open("rb") as stream:
            return stream.read(n_bytes)
    except OSError as error:
        if (remote := remote_file(file)) is None:
            raise unreadable(file, error, CHECK_DISK) from None
    return remote.read_start(n_bytes)


def identity(file: Path) -> list[int | str]:
    """Tell what shows that a weight file was changed: its size in bytes first, then time of change or marks."""
    try:
        facts = file.stat()
    except OSError as error:
        if (remote := remote_file(file)) is None:
            raise unreadable(file, error) from None
        return remote.identity()
    return [facts.st_size, facts.st_mtime_ns]


def parse_header(file: Path, n_file: int, read: Callable[[int, int], bytes]) -> Header:
    """Check the header of a safetensors file of `n_file` bytes, wherever it lies now; `read` takes start and length.

    The tensors get `file`, the path that they have or will have. Raises CheckpointError as `read_header` does.
    """
    length = int.from_bytes(read(0, 8), "little") if n_file >= 8 else -1
    fits = 0 < length <= min(n_file - 8, MAX_HEADER_BYTES)
    raw = read(8, length if fits else 1) if n_file > 8 else b""
    if not fits or not raw.startswith(b"{"):
        raise _not_safetensors(file, n_file, length if raw.startswith(b"{") else -1)
    entries = _parse(file, raw)
    metadata = entries.pop("__metadata__", {})
    tensors = [_tensor_info(file, name, entry, 8 + length) for name, entry in entries.items()]
    tensors.sort(key=lambda info: (info.start, info.end))
    _check_spans(file, tensors, 8 + length, n_file)
    texts = {str(k): str(v) for k, v in metadata.items()} if isinstance(metadata, dict) else {}
    return Header(tuple(tensors), texts, 8 + length)


def _not_safetensors(file: Path, n_file: int, length: int) -> CheckpointError:
    if length > 0 and length + 8 > n_file and length <= MAX_HEADER_BYTES:
        message = f"header of {length} bytes is longer than the file of {n_file} bytes"
        return CheckpointError(Problem(str(file), message, _DAMAGED))
    return CheckpointError(Problem(str(file), "is not a safetensors file", "convert the checkpoint to safetensors"))


def _parse(file: Path, raw: bytes) -> dict[str, Any]:
    try:
        entries = json.loads(raw, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(Problem(str(file), f"broken safetensors header: {error}", _DAMAGED)) from None
    if not isinstance(entries, dict):
        raise CheckpointError(Problem(str(file), "broken safetensors header", _DAMAGED))
    return entries


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name stands twice")
    return entries


def _is_counts(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _tensor_info(file: Path, name: str, entry: Any, data_start: int) -> TensorInfo:  # noqa: ANN401 - parsed JSON
    def fault(message: str) -> CheckpointError:
        return CheckpointError(Problem(f"{file}: {name}", message, _DAMAGED))

    if not isinstance(entry, dict) or not _is_counts(entry.get("shape")) or not _is_counts(entry.get("data_offsets")):
        raise fault("broken header entry")
    dtype, shape, offsets = entry.get("dtype"), tuple(entry["shape"]), entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise fault(f"unknown dtype {dtype}")
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise fault(f"bytes {offsets} do not fit shape {list(shape)} of {dtype}")
    return TensorInfo(name, dtype, shape, file, data_start + offsets[0], data_start + offsets[1])


def _check_spans(file: Path, tensors: list[TensorInfo], data_start: int, n_file: int) -> None:
    expected = data_start
    for info in tensors:
        if info.start != expected:
            message = "overlaps the tensor before it" if info.start < expected else "leaves a hole before it"
            raise CheckpointError(Problem(f"{file}: {info.name}", message, _DAMAGED))
        expected = info.end
    if expected > n_file:
        message = f"truncated: {n_file} bytes, the header says {expected}"
        raise CheckpointError(Problem(str(file), message, _DAMAGED))
    if expected < n_file:
        raise CheckpointError(Problem(str(file), f"{n_file - expected} bytes behind the last tensor", _DAMAGED))


def check_plain_name(place: str, name: object) -> str:
    """Return `name` if it is a file name without any folder; raise CheckpointError otherwise."""
    plain = isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0:")
    if not plain:
        raise CheckpointError(Problem(place, f"unsafe file name {name!r}", "file names may not leave their folder"))
    return str(name)


def read_index(index: Path) -> dict[str, str]:
    """Read `model.safetensors.index.json`: tensor name to file name, every name checked."""
    data = read_json(index)
    weights = data.get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise CheckpointError(Problem(str(index), "has no weight_map", _DAMAGED))
    return {str(name): check_plain_name(str(index), file) for name, file in weights.items()}


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON file that holds one object; raise CheckpointError when it does not."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise unreadable(file, error) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(Problem(str(file), f"broken JSON: {error}", _DAMAGED)) from None
    if not isinstance(data, dict):
        raise CheckpointError(Problem(str(file), "is not a JSON object", _DAMAGED))
    return data


def read_headers(files: Iterable[Path]) -> Iterable[Header]:
    """Read and check the headers of several safetensors files."""
    return map(read_header, files)


def read_tensors(
    folder: Path,
    headers: Callable[[Sequence[Path]], Iterable[Header]] = read_headers,
    weights: str = "model.safetensors",
) -> dict[str, TensorInfo]:
    """Read the headers of all files of weights of a model folder, by tensor name in file order.

    With an index, each tensor must stand in the file that the index names, and no other may. `headers` reads them;
    `weights` is the name of the one file, or what the index is called after.
    """
    index = folder / f"{weights}.index.json"
    if not index.is_file():
        return {info.name: info for header in headers([folder / weights]) for info in header.tensors}
    places = read_index(index)
    tensors: dict[str, TensorInfo] = {}
    files = list(dict.fromkeys(places.values()))
    for file, header in zip(files, headers([folder / file for file in files]), strict=True):
        tensors |= {info.name: info for info in header.tensors if places.get(info.name) == file}
    if missing := [name for name in places if name not in tensors]:
        place = f"{folder / places[missing[0]]}: {missing[0]}"
        raise CheckpointError(Problem(place, "tensor is in the index but not in this file", _DAMAGED))
    return tensors
