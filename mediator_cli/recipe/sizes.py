"""Numbers of bytes, written for people."""

from __future__ import annotations

_STEP = 1000


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
