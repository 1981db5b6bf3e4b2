"""Numbers of bytes, as people write and read them."""

from __future__ import annotations

import math

_STEP = 1000
_SIZE_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def human_bytes(n: float) -> str:
    """Write a number of bytes for people.

    >>> human_bytes(269_000_000), human_bytes(12)
    ('269.0 MB', '12 B')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if n < _STEP:
            return f"{n:.0f} B" if unit == "B" else f"{n:.1f} {unit}"
        n /= _STEP
    return f"{n:.1f} TB"


def parse_size(text: str | int) -> int:
    """Read a number of bytes such as `5GB`, `512MiB` or `1000`; raise ValueError for anything else.

    >>> parse_size("5GB"), parse_size("1.5 KiB"), parse_size(7)
    (5000000000, 1536, 7)
    """
    raw = str(text).strip()
    digits = raw.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
    unit = raw[len(digits) :].strip().upper()
    try:
        size = float(digits) * _SIZE_UNITS[unit]
    except (ValueError, KeyError):
        raise ValueError(f"'{text}' is not a size; write 5GB, 512MiB or a number of bytes") from None
    if not math.isfinite(size) or size < 1:
        raise ValueError(f"'{text}' is not a size of at least one byte")
    return int(size)
