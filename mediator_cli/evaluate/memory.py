"""Memory of this process as the kernel counts it, on Linux; elsewhere nothing is known."""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident_bytes() -> int | None:
    """Count the bytes that the process holds now, after handing back what it freed."""
    gc.collect()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    return _field("VmRSS")


def start_peak() -> None:
    """Make the peak start from what is held now."""
    if _CLEAR.exists():
        _CLEAR.write_text("5")


def peak_bytes() -> int | None:
    """Count the most bytes that the process held since `start_peak`."""
    return _field("VmHWM")


def _field(name: str) -> int | None:
    if not _STATUS.exists():
        return None
    found = re.search(rf"^{name}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else None
