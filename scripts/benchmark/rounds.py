"""Rounds of one job: ours, mergekit's and the floors in turn, so that what slows the machine slows all."""

from __future__ import annotations

import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from benchmark.checkpoints import write_recipe
from benchmark.jobs import JOBS
from benchmark.measure import Run, floor, full_floor, run, size_of, typical
from benchmark.peers import peer_command
from benchmark.shapes import SIZES

if TYPE_CHECKING:
    from benchmark.checkpoints import Inputs

OURS = (sys.executable, "-m", "mediator_cli")


@dataclass(frozen=True)
class Rounds:
    """How often our job and the peer's slow jobs run; the first round of all warms up and does not count."""

    repeat: int
    peer: Path | None
    peer_repeat: int


@dataclass(frozen=True)
class Round:
    """The runs of one round, and the bytes of our output; `again` is ours with the notes that `ours` left."""

    ours: Run
    again: Run
    floor: Run
    full_floor: Run
    peer: Run | None
    output: int


@dataclass(frozen=True)
class Outcome:
    """What a job took, as typical runs; ratios are medians over rounds, of wall times."""

    job: str
    size: str
    experts: int
    links: int
    input_bytes: int
    output_bytes: int
    first_wall: float
    walls: tuple[float, ...]
    ours: Run
    again: Run
    floor: Run
    full_floor: Run
    ratio: float
    full_ratio: float
    peer: Run | None
    peer_walls: tuple[float, ...]

    @property
    def times_faster(self) -> float | None:
        """How many times longer mergekit takes."""
        return self.peer.wall / self.ours.wall if self.peer else None

    def as_json(self) -> dict[str, object]:
        """Give all numbers."""
        return asdict(self) | {"times_faster": self.times_faster}


def measure(job: str, inputs: Inputs, rounds: Rounds) -> Outcome:
    """Run a job in rounds, one more than counts."""
    first, *counted = [one_round(job, inputs, rounds, n) for n in range(rounds.repeat + 1)]
    peers = [one.peer for one in counted if one.peer]
    return Outcome(
        job=job,
        size=inputs.size,
        experts=len(inputs.experts),
        links=inputs.n_links,
        input_bytes=inputs.n_bytes,
        output_bytes=counted[0].output,
        first_wall=first.ours.wall,
        walls=tuple(one.ours.wall for one in counted),
        ours=typical([one.ours for one in counted]),
        again=typical([one.again for one in counted]),
        floor=typical([one.floor for one in counted]),
        full_floor=typical([one.full_floor for one in counted]),
        ratio=median(one.ours.wall / one.floor.wall for one in counted),
        full_ratio=median(one.ours.wall / one.full_floor.wall for one in counted),
        peer=typical(peers) if peers else None,
        peer_walls=tuple(one.wall for one in peers),
    )


def one_round(job: str, inputs: Inputs, rounds: Rounds, n: int) -> Round:
    """Run everything once; outputs are removed between runs."""
    sys.stderr.write(f"{job}, {inputs.size}, {len(inputs.experts)} experts: round {n} of {rounds.repeat}\n")
    output, cache = inputs.folder / "out", inputs.folder / "cache"
    drop(cache)
    ours = run_ours(job, inputs, output, cache)
    n_bytes = size_of([output, *output.rglob("*")])
    drop(output)
    peer = run_peer(job, inputs, rounds, output) if peer_runs(job, rounds, n) else None
    drop(output)
    again = run_ours(job, inputs, output, cache)
    drop(output)
    drop(cache)
    copy = output if JOBS[job].writes else None
    return Round(ours, again, floor(inputs.files, copy), full_floor(inputs.files, copy), peer, n_bytes)


def run_ours(job: str, inputs: Inputs, output: Path, cache: Path) -> Run:
    """Run our command line as a whole process, which keeps digests of its inputs in `cache` for the next run."""
    recipe, layers = write_recipe(inputs), SIZES[inputs.size].layers
    return run(JOBS[job].command(OURS, str(recipe), str(output), layers), cache)


def peer_runs(job: str, rounds: Rounds, n: int) -> bool:
    """Tell whether mergekit takes part: if it has the job, in its slow ones in few rounds and without a warm-up."""
    if rounds.peer is None or JOBS[job].peer is None:
        return False
    return not JOBS[job].slow or 1 <= n <= rounds.peer_repeat


def run_peer(job: str, inputs: Inputs, rounds: Rounds, output: Path) -> Run | None:
    """Run mergekit's program as a whole process."""
    return run(peer_command(rounds.peer, inputs, JOBS[job], output)) if rounds.peer else None


def drop(output: Path) -> None:
    """Remove an output, be it a folder or a file."""
    if output.is_dir():
        shutil.rmtree(output)
    output.unlink(missing_ok=True)
