"""The sparse codec: positions as gaps or as a bitmap, values as floats, int8 steps or signs.

The format is documented byte for byte in README.md beside this file.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

ValueCodec = Literal["fp32", "bf16", "fp16", "int8", "sign"]
IndexCodec = Literal["gaps", "bitmap"]

ESCAPE = 255
ALIGNMENT = 8
_BITMAP_ABOVE = 1 / 8
_FLOAT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_INT8_MAX = 127
_VALUE_BITS: dict[ValueCodec, int] = {"fp32": 32, "bf16": 16, "fp16": 16, "int8": 8, "sign": 1}
_POSITION_BYTES = 8


def index_codec(density: float) -> IndexCodec:
    """Choose the smaller code: a byte for each kept entry, or a bit for every entry."""
    return "bitmap" if density > _BITMAP_ABOVE else "gaps"


def encode_gaps(positions: torch.Tensor, start: int) -> torch.Tensor:
    """Write rising positions [k] as bytes, counting from `start`, the position behind the last one written.

    A byte below 255 skips that many entries and keeps the next; 255 skips 255 entries and keeps none.

    >>> encode_gaps(torch.tensor([0, 2, 300]), 0).tolist()
    [0, 1, 255, 42]
    """
    before = torch.cat([torch.tensor([start - 1]), positions[:-1]])
    gaps = positions - before - 1
    ends = (gaps // ESCAPE + 1).cumsum(0)
    codes = torch.full((int(ends[-1]) if len(ends) else 0,), ESCAPE, dtype=torch.uint8)
    codes[ends - 1] = (gaps % ESCAPE).to(torch.uint8)
    return codes


def decode_gaps(codes: torch.Tensor) -> torch.Tensor:
    """Read positions [k] from gap bytes; int64.

    >>> decode_gaps(torch.tensor([0, 1, 255, 42], dtype=torch.uint8)).tolist()
    [0, 2, 300]
    """
    keeps = codes != ESCAPE
    steps = codes.to(torch.int64) + keeps
    return steps.cumsum(0)[keeps] - 1


def pack_bits(bits: torch.Tensor) -> torch.Tensor:
    """Pack bools [m] into bytes, first entry in the lowest bit."""
    return torch.from_numpy(np.packbits(bits.numpy(), bitorder="little"))


def unpack_bits(packed: torch.Tensor, size: int) -> torch.Tensor:
    """Unpack the first `size` bools."""
    return torch.from_numpy(np.unpackbits(packed.numpy(), bitorder="little", count=size).astype(bool))


def encode_values(values: torch.Tensor, codec: ValueCodec, scale: float) -> torch.Tensor:
    """Turn float32 values [k] into what is stored: a float dtype, int8 steps of `scale`, or bool where positive."""
    if codec == "sign":
        return values > 0
    if codec == "int8":
        return (values.double() / scale).round().clamp(-_INT8_MAX, _INT8_MAX).to(torch.int8)
    return values.to(_FLOAT_DTYPES[codec])


def decode_values(stored: torch.Tensor, codec: ValueCodec, scale: float) -> torch.Tensor:
    """Turn stored values [k] back into float32."""
    if codec == "sign":
        return torch.where(stored, scale, -scale).float()
    if codec == "int8":
        return (stored.double() * scale).float()
    return stored.float()


def most_bytes(size: int, n_kept: int, values: ValueCodec, index: IndexCodec | None) -> int:
    """Bound the bytes of a tensor's arrays without overrides; `index` None where it is chosen by what is kept.

    Without a given index, `n_kept` may also be a share of what several tensors keep: then their sum is bounded.
    """
    n_values = -(-n_kept * _VALUE_BITS[values] // 8)
    skipped = (size - n_kept) // ESCAPE
    if index is None:
        # A bitmap is taken only where it has fewer bytes than entries are kept.
        return n_values + n_kept + size // ESCAPE + 1 + 2 * ALIGNMENT
    return _aligned(n_values) + _aligned(-(-size // 8) if index == "bitmap" else n_kept + skipped)


def most_override_bytes(size: int, value_bytes: int) -> int:
    """Bound the bytes of a tensor's overrides, each a position and a value of so many bytes."""
    return _aligned(size * _POSITION_BYTES) + _aligned(size * value_bytes)


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


def padded(array: torch.Tensor, fill: int = 0) -> torch.Tensor:
    """Append `fill` until the array's bytes are a multiple of 8, so that what follows stays aligned."""
    missing = -array.numel() * array.element_size() % ALIGNMENT // array.element_size()
    if not missing:
        return array
    return torch.cat([array, torch.full((missing,), fill, dtype=array.dtype)])


def same_bits(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Compare entry by entry, telling 0 from -0; bool."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    kind = kinds[left.element_size()]
    return left.contiguous().view(kind) == right.contiguous().view(kind)
