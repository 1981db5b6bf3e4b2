"""The sparse codec: positions as gaps or as a bitmap, values as floats, int8 steps or signs.

The format is documented byte for byte in README.md beside this file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mediator_cli.kernels.floats import narrow_bf16, narrow_f16, widen_bf16, widen_f16
from mediator_cli.kernels.sparse import give_steps, take_signs, take_steps

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mediator_cli.kernels.arrays import Bytes, Counts, Flags, Floats, Halves

ValueCodec = Literal["fp32", "bf16", "fp16", "int8", "sign"]
StoredValues = ValueCodec | Literal["shared", "factors"]
"""Where an expert's values come from: its own file, the arrays that experts share, or a product of two matrices."""
IndexCodec = Literal["gaps", "bitmap"]
StoredIndex = IndexCodec | Literal["all"]
"""Which entries are stored: those listed, those of a bitmap, or all."""

FLOAT_CODECS: tuple[ValueCodec, ...] = ("fp32", "bf16", "fp16")
"""Codecs whose values stand by themselves, without a scale."""
ESCAPE = 255
ALIGNMENT = 8
_BITMAP_ABOVE = 1 / 8
INT8_MAX = 127
_VALUE_BITS: dict[ValueCodec, int] = {"fp32": 32, "bf16": 16, "fp16": 16, "int8": 8, "sign": 1}
_POSITION_BYTES = 8


def index_codec(density: float) -> IndexCodec:
    """Choose the smaller code: a byte for each kept entry, or a bit for every entry."""
    return "bitmap" if density > _BITMAP_ABOVE else "gaps"


def encode_gaps(positions: Counts, start: int) -> Bytes:
    """Write rising positions [k] as bytes, counting from `start`, the position behind the last one written.

    A byte below 255 skips that many entries and keeps the next; 255 skips 255 entries and keeps none.

    >>> encode_gaps(np.array([0, 2, 300]), 0).tolist()
    [0, 1, 255, 42]
    """
    gaps = np.diff(positions, prepend=start - 1) - 1
    ends = np.cumsum(gaps // ESCAPE + 1)
    codes = np.full(ends[-1] if len(ends) else 0, ESCAPE, np.uint8)
    codes[ends - 1] = gaps % ESCAPE
    return codes


def decode_gaps(codes: Bytes) -> Counts:
    """Read positions [k] from gap bytes.

    >>> decode_gaps(np.array([0, 1, 255, 42], np.uint8)).tolist()
    [0, 2, 300]
    """
    keeps = codes != ESCAPE
    # A byte that keeps an entry is below 255, so its step fits in a byte.
    ends = np.cumsum(codes + keeps, dtype=np.int64)
    positions: Counts = ends[keeps] - 1
    return positions


def pack_bits(bits: Flags) -> Bytes:
    """Pack bools [m] into bytes, first entry in the lowest bit."""
    return np.packbits(bits, bitorder="little")


def unpack_bits(packed: Bytes, size: int) -> Flags:
    """Unpack the first `size` bools."""
    return np.unpackbits(packed, bitorder="little", count=size).view(np.bool_)


def encode_values(values: Floats, codec: ValueCodec, scale: float) -> NDArray[Any]:
    """Turn float32 values [k] into what is stored: float32, 16-bit patterns, int8 steps of `scale`, bool if positive.

    A value beyond the range of its 16-bit format becomes infinite.
    """
    if codec == "sign":
        return values > 0
    if codec == "int8":
        steps = np.empty(len(values), np.int8)
        give_steps(values, scale, steps)
        return steps
    if codec == "fp32":
        return values
    return _narrow(values, codec)


def _narrow(values: Floats, codec: Literal["bf16", "fp16"]) -> Halves:
    stored = np.empty(len(values), np.uint16)
    if codec == "bf16":
        narrow_bf16(values, stored)
    elif not narrow_f16(values, stored):
        with np.errstate(over="ignore"):
            stored[:] = values.astype(np.float16).view(np.uint16)
    return stored


def decode_values(stored: NDArray[Any], codec: ValueCodec, scale: float) -> Floats:
    """Turn stored values [k] back into float32."""
    if codec == "fp32":
        return stored
    values = np.empty(len(stored), np.float32)
    if codec in ("bf16", "fp16"):
        (widen_bf16 if codec == "bf16" else widen_f16)(stored, values)
    else:
        # A scale that is too large for float32 gives infinite values, which verifying tells.
        (take_signs if codec == "sign" else take_steps)(stored, scale, values)
    return values


def most_bytes(size: int, n_kept: int, values: ValueCodec, index: IndexCodec | None) -> int:
    """Bound the bytes of a tensor's arrays without overrides; `index` None where it is chosen by what is kept.

    Without a given index, `n_kept` may also be a share of what several tensors keep: then their sum is bounded.
    """
    n_values = -(-n_kept * _VALUE_BITS[values] // 8)
    skipped = (size - n_kept) // ESCAPE
    if index is None:
        # A bitmap is taken only where it has fewer bytes than entries are kept.
        return n_values + n_kept + size // ESCAPE + 1 + 2 * ALIGNMENT
    return aligned(n_values) + aligned(-(-size // 8) if index == "bitmap" else n_kept + skipped)


def gated_bytes(size: int, n_shared: int, has_bits: bool) -> int:
    """Count the bytes of what one expert keeps of a tensor that is not sparse: a bit an entry, and coefficients."""
    return (aligned(-(-size // 8)) if has_bits else 0) + 8 * n_shared


def shared_bytes(size: int, n_shared: int, values: ValueCodec) -> int:
    """Count the bytes of the arrays that experts share of a tensor."""
    return aligned(-(-n_shared * size * _VALUE_BITS[values] // 8))


def most_override_bytes(size: int, value_bytes: int) -> int:
    """Bound the bytes of a tensor's overrides, each a position and a value of so many bytes."""
    return aligned(size * _POSITION_BYTES) + aligned(size * value_bytes)


def aligned(n_bytes: int) -> int:
    """Round a number of bytes up to what keeps the next array aligned."""
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT
