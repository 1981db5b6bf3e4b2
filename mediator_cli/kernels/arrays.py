"""Names for the kinds of arrays that kernels take."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Bytes = NDArray[np.uint8]
Halves = NDArray[np.uint16]
"""Bit patterns of bfloat16 or float16."""
Words = NDArray[np.uint32]
Longs = NDArray[np.uint64]
Counts = NDArray[np.int64]
Flags = NDArray[np.bool_]


def bytes_of(array: NDArray[Any]) -> memoryview:
    """Give the bytes of an array, without a copy if it is contiguous."""
    if not array.size:
        return memoryview(bytearray())
    return np.ascontiguousarray(array).data.cast("B")
