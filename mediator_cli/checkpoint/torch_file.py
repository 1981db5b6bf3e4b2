"""Tensors of pytorch_model.bin: where each lies in the file, found without reading any of it.

A .bin is a zip of stored records with a pickle that says how tensors are cut from them. Only torch's restricted loader
(weights_only) touches the pickle, and every place that it gives is checked against the zip's own directory.
This module needs torch: it is imported when a .bin is opened, so that folders of safetensors are read without it.
"""

from __future__ import annotations

import math
import pickle
import re
import shlex
import zipfile
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mediator_cli.checkpoint.header import DTYPE_BYTES, TensorInfo, unreadable
from mediator_cli.checkpoint.layout import place_of
from mediator_cli.errors import CheckpointError, Problem, first_line

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64",
    torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64",
    torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64",
}  # fmt: skip
"""What torch's dtypes are called in headers."""
_ZIP, _LOCAL_HEADER = b"PK\x03\x04", 30
_DAMAGED = "the file is damaged or was not downloaded completely; fetch it again"
_SAVE_AGAIN = "load the model with transformers and save it with save_pretrained, which writes safetensors"
_UNSAFE = "loading such a file can run any program; ask its author for safetensors"
# What a broken pickle makes torch's loader raise. Anything else is a defect of this program.
_BROKEN = (
    RuntimeError, EOFError, LookupError, AttributeError, TypeError, ValueError, AssertionError, ArithmeticError,
    MemoryError, NotImplementedError,
)  # fmt: skip


def read_torch_file(file: Path) -> tuple[TensorInfo, ...]:
    """Find the tensors of one .bin file, in the order of its dictionary; several names may share the same bytes.

    Raises CheckpointError for anything but contiguous tensors in a zip that torch.save wrote.
    """
    records = _read_records(file)
    named = _find_tensors(file, _load(file))
    problems = [problem for name, item in named.items() for problem in _check_tensor(file, name, item)]
    if problems:
        raise CheckpointError(problems)
    return tuple(_locate(file, name, item, records) for name, item in named.items())


def without_second_names(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """Leave out names of bytes that have a name already, as save_pretrained of transformers does for safetensors.

    Such are the copies of tied embeddings, which torch.save stores once. Names inside layers are kept, because layers
    that share tensors are still layers, and so is a head whose config says that it is not tied.
    """
    first: dict[tuple[Path, int, int], str] = {}
    for name, info in tensors.items():
        first.setdefault((info.file, info.start, info.end), name)
    untied = config.get("tie_word_embeddings") is False

    def is_own(name: str, info: TensorInfo) -> bool:
        is_second = info.size > 0 and first[info.file, info.start, info.end] != name
        return not is_second or place_of(name).layer is not None or (untied and name.endswith("lm_head.weight"))

    return {name: info for name, info in tensors.items() if is_own(name, info)}


def _read_records(file: Path) -> dict[int, int]:
    """Map where each record's data starts to its number of bytes, from the zip's directory."""
    try:
        with file.open("rb") as stream:
            if (head := stream.read(4)) != _ZIP:
                raise _not_a_zip(file, head)
            with zipfile.ZipFile(stream) as archive:
                _check_archive(file, archive)
                return {_data_start(archive, record): record.file_size for record in archive.infolist()}
    except OSError as error:
        raise unreadable(file, error) from None
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError) as error:
        raise CheckpointError(Problem(str(file), f"broken zip: {first_line(error)}", _DAMAGED)) from None


def _not_a_zip(file: Path, head: bytes) -> CheckpointError:
    if head[:1] != b"\x80":
        return CheckpointError(Problem(str(file), "is not a file of torch.save", _DAMAGED))
    load = 'torch.save(torch.load(f, map_location="cpu", weights_only=True), f + ".new"); os.replace(f + ".new", f)'
    command = f"python -c {shlex.quote(f'import os, sys, torch; f = sys.argv[1]; {load}')} {shlex.quote(str(file))}"
    message = "has the format of torch before 1.6, in which tensors cannot be found without reading all of it"
    return CheckpointError(Problem(str(file), message, f"save it again: {command}"))


def _check_archive(file: Path, archive: zipfile.ZipFile) -> None:
    if any(record.filename.endswith("/constants.pkl") for record in archive.infolist()):
        raise CheckpointError(Problem(str(file), "holds a TorchScript program, not tensors alone", _UNSAFE))
    for record in archive.infolist():
        if (
            record.compress_type != zipfile.ZIP_STORED
            or record.flag_bits & 1
            or record.compress_size != record.file_size
        ):
            raise CheckpointError(Problem(f"{file}: {record.filename}", "is compressed in the zip", _SAVE_AGAIN))
    for record in archive.infolist():
        if record.filename.endswith("/byteorder") and archive.read(record)[:3] == b"big":
            raise CheckpointError(Problem(str(file), "was written on a big-endian machine", _SAVE_AGAIN))


def _data_start(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> int:
    """Find a record's data behind its local header, whose name and padding may differ from the directory's."""
    stream = archive.fp
    if stream is None:
        raise ValueError("the zip is closed")
    stream.seek(record.header_offset)
    local = stream.read(_LOCAL_HEADER)
    if local[:4] != _ZIP or len(local) != _LOCAL_HEADER:
        raise zipfile.BadZipFile(f"no local header of {record.filename}")
    n_name, n_extra = int.from_bytes(local[26:28], "little"), int.from_bytes(local[28:30], "little")
    return record.header_offset + _LOCAL_HEADER + n_name + n_extra


def _load(file: Path) -> object:
    try:
        # Under this mode storages have no memory, and torch 2.7 and later say where in the file they lie.
        with FakeTensorMode():
            loaded: object = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise unreadable(file, error) from None
    except pickle.UnpicklingError as error:
        raise _refused_pickle(file, error) from None
    except _BROKEN as error:
        raise CheckpointError(Problem(str(file), f"broken pickle: {first_line(error)}", _DAMAGED)) from None
    return loaded


def _refused_pickle(file: Path, error: pickle.UnpicklingError) -> CheckpointError:
    if asked := re.search(r"GLOBAL (\S+)", str(error)):
        return CheckpointError(Problem(str(file), f"holds more than tensors: it asks for {asked[1]}", _UNSAFE))
    reason = first_line(error).removeprefix("Weights only load failed. ")
    return CheckpointError(Problem(str(file), f"broken pickle: {reason}", _DAMAGED))


def _find_tensors(file: Path, loaded: object) -> dict[str, torch.Tensor]:
    """Take the one dictionary of tensors: the whole, or the only entry of it that is one."""
    entries = _dictionary(loaded)
    if not any(isinstance(value, torch.Tensor) for value in entries.values()):
        inner = {key: value for key, value in entries.items() if _holds_tensors(value)}
        if len(inner) != 1:
            found = f"several: {', '.join(map(str, inner))}" if inner else "none"
            message = f"must hold one dictionary of tensors, has {found}"
            raise CheckpointError(Problem(str(file), message, _SAVE_AGAIN))
        entries = _dictionary(next(iter(inner.values())))
    for name, value in entries.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            message = f"is of type {type(value).__name__}, not a tensor"
            raise CheckpointError(Problem(f"{file}: {name}", message, _SAVE_AGAIN))
    return entries


def _dictionary(value: object) -> dict[Any, Any]:
    return dict(value) if isinstance(value, dict) else {}


def _holds_tensors(value: object) -> bool:
    return bool(_dictionary(value)) and all(isinstance(item, torch.Tensor) for item in _dictionary(value).values())


def _check_tensor(file: Path, name: str, item: torch.Tensor) -> Iterator[Problem]:
    """Say why a tensor's bytes do not lie in the file one after the other."""
    place = f"{file}: {name}"
    if item.dtype not in DTYPES:
        yield Problem(place, f"dtype {item.dtype} is not supported", "save it as bfloat16 or float32")
    elif str(item.layout) != "torch.strided" or item.is_neg() or item.is_conj():
        yield Problem(place, f"layout {item.layout} is not that of a plain tensor", _SAVE_AGAIN)
    elif not item.is_contiguous():
        yield Problem(place, f"is not contiguous (strides {list(item.stride())})", _SAVE_AGAIN)


def _locate(file: Path, name: str, item: torch.Tensor, records: Mapping[int, int]) -> TensorInfo:
    dtype, shape = DTYPES[item.dtype], tuple(item.shape)
    record = getattr(item.untyped_storage(), "_checkpoint_offset", None)
    if record is None:
        message = "this version of torch does not say where tensors lie in a .bin"
        raise CheckpointError(Problem(str(file), message, "install torch 2.7 or later"))
    first = int(item.storage_offset()) * DTYPE_BYTES[dtype]
    last = first + math.prod(shape) * DTYPE_BYTES[dtype]
    if record not in records or last > records[record]:
        raise CheckpointError(Problem(f"{file}: {name}", "lies outside the zip's records", _DAMAGED))
    return TensorInfo(name, dtype, shape, file, record + first, record + last)
