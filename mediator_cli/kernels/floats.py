"""Between stored float formats and float32. A format of 16 bits is an array of its bit patterns."""

from __future__ import annotations

import numpy as np

from mediator_cli.kernels.arrays import Floats, Halves
from mediator_cli.kernels.jit import kernel


@kernel
def widen_bf16(raw: Halves, out: Floats) -> bool:
    """Turn bfloat16 bits [m] into float32 [m]; tell whether all are finite."""
    bits = out.view(np.uint32)
    worst = np.uint32(0)
    for i in range(raw.shape[0]):
        bits[i] = np.uint32(np.uint32(raw[i]) << np.uint32(16))
        worst = max(worst, np.uint32(raw[i] & np.uint16(0x7FFF)))
    return bool(worst < np.uint32(0x7F80))


@kernel
def is_finite(values: Floats) -> bool:
    """Tell whether all entries [m] are finite."""
    bits = values.view(np.uint32)
    worst = np.uint32(0)
    for i in range(bits.shape[0]):
        worst = max(worst, np.uint32(bits[i] & np.uint32(0x7FFFFFFF)))
    return bool(worst < np.uint32(0x7F800000))


@kernel
def narrow_bf16(values: Floats, out: Halves) -> bool:
    """Round float32 [m] to the nearest bfloat16 bits [m], ties to even; tell whether all results are finite.

    Where they are not, the bits of a NaN are of no use.
    """
    bits = values.view(np.uint32)
    worst = np.uint32(0)
    for i in range(bits.shape[0]):
        v = bits[i]
        odd = np.uint32((v >> np.uint32(16)) & np.uint32(1))
        out[i] = np.uint16(np.uint32(v + np.uint32(0x7FFF) + odd) >> np.uint32(16))
        worst = max(worst, np.uint32(v & np.uint32(0x7FFFFFFF)))
    return bool(worst < np.uint32(0x7F7F8000))


@kernel
def widen_f16(raw: Halves, out: Floats) -> bool:
    """Turn float16 bits [m] into float32 [m]; tell whether all are finite. Infinity becomes 65536 with its sign."""
    bits = out.view(np.uint32)
    worst = np.uint32(0)
    for i in range(raw.shape[0]):
        h = np.uint32(raw[i])
        magnitude = np.uint32(h & np.uint32(0x7FFF))
        bits[i] = np.uint32(magnitude << np.uint32(13)) | np.uint32(np.uint32(h & np.uint32(0x8000)) << np.uint32(16))
        worst = max(worst, magnitude)
    # The exponent is 112 too low; a product mends it for subnormal numbers too, which is exact.
    for i in range(out.shape[0]):
        out[i] = out[i] * np.float32(2.0**112)
    return bool(worst < np.uint32(0x7C00))


@kernel
def narrow_f16(values: Floats, out: Halves) -> bool:
    """Round float32 [m] to the nearest float16 bits [m], ties to even; tell whether all results are finite.

    Where they are not, the bits are of no use.
    """
    size = min(values.shape[0], 1024)
    shifted = np.empty(size, np.float32)
    low = shifted.view(np.uint32)
    worst = np.uint32(0)
    for start in range(0, values.shape[0], 1024):
        part = values[start : start + 1024]
        bits, target = part.view(np.uint32), out[start : start + 1024]
        # Below 2⁻¹⁴ the sum with 0.5 rounds to the step of subnormal numbers, which then stands in the lowest bits.
        for i in range(part.shape[0]):
            shifted[i] = abs(part[i]) + np.float32(0.5)
        for i in range(part.shape[0]):
            v = np.uint32(bits[i] & np.uint32(0x7FFFFFFF))
            odd = np.uint32((v >> np.uint32(13)) & np.uint32(1))
            normal = np.uint32(np.uint32(v - np.uint32(0x38000000) + np.uint32(0xFFF) + odd) >> np.uint32(13))
            small = np.uint32(low[i] - np.uint32(0x3F000000))
            magnitude = small if v < np.uint32(0x38800000) else normal
            sign = np.uint32(np.uint32(bits[i] >> np.uint32(16)) & np.uint32(0x8000))
            target[i] = np.uint16(magnitude | sign)
            worst = max(worst, v)
    return bool(worst < np.uint32(0x477FF000))
