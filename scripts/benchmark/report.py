"""The machine in one line, and plain tables."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from benchmark.rounds import Outcome

OURS = ("mediator-merge", "numpy", "numba", "xxhash")
HEAD = (
    "job", "wall s", "cpu s", "peak MB", "read GB", "written GB", "again s", "floor s", "wall / floor", "full floor s",
    "wall / full floor", "mergekit s", "its cpu s", "its peak MB", "times faster",
)  # fmt: skip
CURVE_HEAD = ("job", "size", "experts", "in GB", "out GB", *HEAD[1:11])
LEGEND = """
Whole processes, warm page cache, medians; peaks are the highest of all runs. Floor: `cat` of all inputs and `cp` of one
output (none for analyze-conflicts), in the same rounds. Full floor: the same in one thread of Python with xxh3 of all
bytes and fsync of the output, as our merges do; mergekit does neither, and computes in bfloat16 where we take float32.
Bytes are those of read and write calls. Each run of ours is the first of these inputs; `again` follows it, when their
digests and what can be routed are known.
"""


def memory_bytes() -> int:
    """Read the size of this machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def machine() -> str:
    """Name the processor, its cores and the memory."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    model = models[0] if models else platform.machine()
    return f"{model}, {os.cpu_count()} cores, {memory_bytes() / 1e9:.0f} GB"


def versions() -> str:
    """Name what runs our side."""
    return ", ".join([f"Python {platform.python_version()}", *(f"{name} {installed(name)}" for name in OURS)])


def installed(name: str) -> str:
    """Give the version of a package, or say that there is none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def command() -> str:
    """Give the command line of this run."""
    return shlex.join(["python", *sys.argv])


def table_head(names: Sequence[str]) -> str:
    """Write the head of a table."""
    return row(names) + row(["---"] * len(names))


def row(cells: Iterable[str]) -> str:
    """Write one row of a table."""
    return "| " + " | ".join(cells) + " |\n"


def job_row(outcome: Outcome) -> str:
    """Write one job, and mergekit's run of it."""
    peer, faster = outcome.peer, outcome.times_faster
    theirs = ["", "", "", ""]
    if peer and faster:
        theirs = [f"{peer.wall:.1f}", f"{peer.cpu:.1f}", f"{peer.peak / 1e6:.0f}", f"{faster:.1f}"]
    return row([outcome.job, *own_cells(outcome), *theirs])


def own_cells(outcome: Outcome) -> list[str]:
    """Write what a job of ours took, and its floors."""
    ours = outcome.ours
    taken = [f"{ours.wall:.2f}", f"{ours.cpu:.2f}", f"{ours.peak / 1e6:.0f}"]
    moved = [f"{ours.read / 1e9:.3g}", f"{ours.written / 1e9:.3g}"]
    floors = [f"{outcome.again.wall:.2f}", f"{outcome.floor.wall:.2f}", f"{outcome.ratio:.1f}"]
    return [*taken, *moved, *floors, f"{outcome.full_floor.wall:.2f}", f"{outcome.full_ratio:.1f}"]


def curve_row(outcome: Outcome) -> str:
    """Write one point of a curve."""
    moved = [f"{outcome.input_bytes / 1e9:.3g}", f"{outcome.output_bytes / 1e9:.3g}"]
    return row([outcome.job, outcome.size, str(outcome.experts), *moved, *own_cells(outcome)])


def links_note(outcome: Outcome) -> str:
    """Say which inputs are not bytes of their own."""
    if not outcome.links:
        return ""
    what = f"{outcome.size}: {outcome.links} of {outcome.experts} experts are hard links"
    return f"{what} to the others, with which they share the page cache and in part the processor's.\n"
