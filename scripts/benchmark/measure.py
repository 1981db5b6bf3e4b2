"""What a process takes: time, memory, bytes. Linux only, standard library only.

The peak of a process is never told as less than what this process itself has held (Linux hands it on), so this
process imports nothing large.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

TOLD = 2000
"""Bytes of a failed process's errors that are shown."""
COPY = Path(__file__).with_name("copy_all.py")


@dataclass(frozen=True)
class Run:
    """Seconds on the wall and of processor, peak resident bytes, bytes of read and of write calls.

    Reading through a memory map is no call, so it does not count.
    """

    wall: float
    cpu: float
    peak: int
    read: int
    written: int


def run(command: Sequence[str], cache: Path | None = None) -> Run:
    """Run a process to its end, on a disk with nothing left to write; end with its errors when it fails."""
    os.sync()
    with tempfile.TemporaryFile() as errors:
        started = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env=environment(cache))
        # Left as a zombie, it can still be asked what it read and wrote, with its children.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        wall = time.monotonic() - started
        counts = transfers(process.pid)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"exit code {process.returncode}: {' '.join(command)}\n{tail(errors)}")
    cpu = usage.ru_utime + usage.ru_stime
    return Run(wall, cpu, usage.ru_maxrss * 1024, counts["rchar"], counts["wchar"])


def environment(cache: Path | None) -> dict[str, str]:
    """Leave out settings of threads, so that each tool takes its own default; name the folder of our notes."""
    dropped = ("_NUM_THREADS", "DONTWRITEBYTECODE")
    kept = {name: value for name, value in os.environ.items() if not name.endswith(dropped)}
    return kept | ({"MEDIATOR_CACHE": str(cache.resolve())} if cache else {})


def transfers(pid: int) -> dict[str, int]:
    """Read the counts of bytes that Linux keeps of a process."""
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return {name: int(count) for name, count in (line.split(": ") for line in lines)}


def tail(errors: BinaryIO) -> str:
    """Read the end of what a process said."""
    errors.seek(max(0, errors.seek(0, os.SEEK_END) - TOLD))
    return errors.read().decode(errors="replace")


def typical(runs: Sequence[Run]) -> Run:
    """Take medians; of the peak, the highest."""
    return Run(
        median(one.wall for one in runs),
        median(one.cpu for one in runs),
        max(one.peak for one in runs),
        int(median(one.read for one in runs)),
        int(median(one.written for one in runs)),
    )


def floor(inputs: Sequence[Path], output: Path | None) -> Run:
    """Read all inputs with `cat` and write one copy of the first with `cp`, if there is an output.

    What `cat` writes to nowhere counts as written.
    """
    script = 'cat "$@" > /dev/null' + (' && cp --reflink=never "$1" "$0"' if output else "")
    found = run(["sh", "-c", script, str(output), *map(str, inputs)])
    remove(output)
    return found


def full_floor(inputs: Sequence[Path], output: Path | None) -> Run:
    """Do the same in one thread, with what a merge of ours does on top: xxh3 of all bytes, fsync of the output."""
    found = run([sys.executable, str(COPY), str(output or "-"), *map(str, inputs)])
    remove(output)
    return found


def remove(file: Path | None) -> None:
    """Remove a file if there is one."""
    if file:
        file.unlink(missing_ok=True)


def size_of(files: Iterable[Path]) -> int:
    """Add up the bytes of files."""
    return sum(file.stat().st_size for file in files if file.is_file())
