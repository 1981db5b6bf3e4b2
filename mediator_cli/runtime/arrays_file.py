"""A small safetensors file of named arrays, as routers and gates have."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from mediator_cli.checkpoint.write import NewTensor, create_file, write_at, write_error

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

_DTYPES = {np.dtype(np.float32): "F32", np.dtype(np.float64): "F64"}


def write_arrays(file: Path, arrays: Mapping[str, NDArray[np.generic]], metadata: Mapping[str, str]) -> None:
    """Write float32 and float64 arrays to a new file and wait until the disk has them.

    Raises OutputError when the file exists or the disk refuses.
    """
    ordered = sorted(arrays, key=lambda name: -arrays[name].itemsize)
    tensors = [NewTensor(name, _DTYPES[arrays[name].dtype], arrays[name].shape) for name in ordered]
    places = create_file(file, tensors, metadata)
    try:
        with file.open("r+b") as stream:
            for name in ordered:
                data = memoryview(np.ascontiguousarray(arrays[name]).tobytes())
                write_at(stream.fileno(), file, data, places[name].start)
            os.fsync(stream.fileno())
    except OSError as error:
        raise write_error(file, error) from None
