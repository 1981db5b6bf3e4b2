"""Time, memory and bytes of whole merges, beside the floor of reading and writing, and beside mergekit.

The checkpoints have the true shapes of Qwen2.5 and random bf16 numbers; they are made once in the work folder. Each
job runs as a whole process of our command line, in turn with mergekit's run of it (`--peers`, or `--mergekit`).
Run it on an idle Linux machine: `make bench`, or `python scripts/bench_peers.py --help`.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmark import curve, report
from benchmark.checkpoints import make_inputs
from benchmark.jobs import CURVE_JOBS, JOBS
from benchmark.measure import run
from benchmark.peers import make_environment, peer_versions
from benchmark.rounds import Outcome, Rounds, measure
from benchmark.shapes import SIZES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True)
class Told:
    """What was told so far, and the file that gets it as JSON after each job."""

    head: Mapping[str, object]
    file: Path | None

    def keep(self, **found: object) -> None:
        """Write the JSON anew."""
        if self.file:
            self.file.write_text(json.dumps({**self.head, **found}, indent=2) + "\n")


def main() -> None:
    """Measure and print."""
    arguments = parse()
    program = make_environment(arguments.work / "mergekit") if arguments.peers else arguments.mergekit
    told = Told(head(arguments, program), arguments.json)
    sys.stdout.write("; ".join(str(part) for part in told.head.values()) + "\n\n")
    (print_curve if arguments.curve else print_jobs)(arguments, program, told)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="0.5B")
    parser.add_argument("--experts", type=int, default=4, help="default: 4")
    parser.add_argument("--job", choices=list(JOBS), action="append", help="only this job; repeatable")
    parser.add_argument("--repeat", type=int, default=5, help="runs that count, after one that does not; default: 5")
    parser.add_argument("--peer-repeat", type=int, default=1, help="runs of mergekit's slow jobs; default: 1")
    parser.add_argument("--work", type=Path, default=Path("bench"), help="folder for checkpoints and outputs")
    parser.add_argument("--json", type=Path, help="also write all numbers to this file")
    parser.add_argument("--curve", action="store_true", help="ours alone, over numbers of experts and over sizes")
    peers = parser.add_mutually_exclusive_group()
    peers.add_argument("--mergekit", type=Path, help="path of mergekit-yaml, to run it in turn where it has the job")
    peers.add_argument("--peers", action="store_true", help="the same, in an environment made in the work folder")
    arguments = parser.parse_args()
    if arguments.repeat < 1 or arguments.peer_repeat < 1 or arguments.experts < 1:
        parser.error("--repeat, --peer-repeat and --experts are at least 1")
    return arguments


def head(arguments: argparse.Namespace, program: Path | None) -> dict[str, object]:
    """Say where and with what this runs."""
    found: dict[str, object] = {"machine": report.machine(), "versions": report.versions()}
    if program and not arguments.curve:
        run([str(program), "--help"])
        found["peer"] = peer_versions(program)
    return found | {"command": report.command()}


def print_jobs(arguments: argparse.Namespace, program: Path | None, told: Told) -> None:
    """Print one row for each job."""
    inputs = make_inputs(arguments.work, arguments.size, arguments.experts, report.memory_bytes())
    rounds = Rounds(arguments.repeat, program, arguments.peer_repeat)
    billions = SIZES[arguments.size].parameters / 1e9
    sys.stdout.write(f"{arguments.experts} experts of {billions:.3g} B parameters, bf16, {rounds.repeat} runs\n\n")
    sys.stdout.write(report.table_head(report.HEAD))
    outcomes: list[Outcome] = []
    for job in arguments.job or JOBS:
        outcomes.append(measure(job, inputs, rounds))
        show(report.job_row(outcomes[-1]))
        told.keep(jobs=[one.as_json() for one in outcomes])
    show(report.LEGEND, report.links_note(outcomes[0]))


def print_curve(arguments: argparse.Namespace, _: Path | None, told: Told) -> None:
    """Print one row for each point, then what follows."""
    rounds, jobs = Rounds(arguments.repeat, None, 0), arguments.job or CURVE_JOBS
    outcomes: list[Outcome] = []
    sys.stdout.write(report.table_head(report.CURVE_HEAD))
    for size, experts in curve.points(arguments.size):
        inputs = make_inputs(arguments.work, size, experts, report.memory_bytes())
        for job in jobs:
            outcomes.append(measure(job, inputs, rounds))
            show(report.curve_row(outcomes[-1]))
            told.keep(curve=[one.as_json() for one in outcomes])
    show(report.LEGEND, *dict.fromkeys(report.links_note(one) for one in outcomes), "\n")
    conclude(jobs, outcomes, told)


def conclude(jobs: Sequence[str], outcomes: Sequence[Outcome], told: Told) -> None:
    """Print the laws and what they say of a large merge."""
    laws = []
    for job in jobs:
        own = [one for one in outcomes if one.job == job]
        found = curve.fit(own)
        computed = curve.large(found, own)
        show(curve.tell(found, computed))
        laws.append(curve.as_json(found, computed))
    told.keep(curve=[one.as_json() for one in outcomes], laws=laws)


def show(*texts: str) -> None:
    """Write to the terminal at once."""
    sys.stdout.write("".join(texts))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
