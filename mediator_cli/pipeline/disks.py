"""How fast disks are, and what of a file is in the computer's memory."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from mediator_cli.engine.pool import run_all

if TYPE_CHECKING:
    from collections.abc import Sequence

UNKNOWN = 1e9
"""Bytes a second of a disk that cannot be measured."""
_READ, _WRITE = 256 << 20, 128 << 20
_SLAB = 1 << 17
"""Bytes that a worker of a merge reads at a time."""
_LOOKS = 16


def read_rate(file: Path | None) -> float:
    """Measure bytes a second that come from the disk: the beginning of a file, dropped from memory and read again."""
    if file is None or not hasattr(os, "posix_fadvise"):
        return UNKNOWN
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError:
        return UNKNOWN
    try:
        size = min(_READ, os.fstat(descriptor).st_size)
        os.posix_fadvise(descriptor, 0, size, os.POSIX_FADV_DONTNEED)
        began = time.perf_counter()
        run_all(lambda at: os.pread(descriptor, _SLAB, at), range(0, size, _SLAB), os.cpu_count() or 1)
        return max(1.0, size / (time.perf_counter() - began))
    except OSError:
        return UNKNOWN
    finally:
        os.close(descriptor)


def write_rate(folder: Path) -> float:
    """Measure bytes a second that the disk under a folder takes up, in a file that nobody sees."""
    try:
        with tempfile.TemporaryFile(dir=folder) as stream:
            stream.write(os.urandom(1 << 20) * (_WRITE >> 20))
            stream.flush()
            began = time.perf_counter()
            os.fdatasync(stream.fileno())
            return _WRITE / (time.perf_counter() - began)
    except OSError:
        return UNKNOWN


def cached_share(files: Sequence[Path]) -> float:
    """Estimate the share of files that is in memory, from some places in each; 1 where the system does not tell."""
    if not hasattr(os, "RWF_NOWAIT"):
        return 1.0
    found = [is_there for file in files for is_there in _looks(file)]
    return sum(found) / len(found) if found else 1.0


def _looks(file: Path) -> list[bool]:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        return [_is_in_memory(descriptor, (2 * at + 1) * size // (2 * _LOOKS)) for at in range(_LOOKS)]
    finally:
        os.close(descriptor)


def _is_in_memory(descriptor: int, at: int) -> bool:
    try:
        return os.preadv(descriptor, [bytearray(1)], at, os.RWF_NOWAIT) >= 0
    except BlockingIOError:
        return False
    except OSError:
        # This file system cannot be asked.
        return True


def free_memory() -> float:
    """Count the bytes of memory that files may take."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        facts = dict(line.split(":", 1) for line in lines)
        return float(facts["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2
