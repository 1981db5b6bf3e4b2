"""Measure, once, what this machine takes for the steps of a merge; kept in the user's cache for the plans to come."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mediator_cli.checkpoint.cache import read_note, write_note
from mediator_cli.checkpoint.digest import fold
from mediator_cli.pipeline.cost import DIGEST, USUAL, Step, list_steps, read_step
from mediator_cli.pipeline.disks import cached_share, free_memory, read_rate, write_rate
from mediator_cli.pipeline.download import existing_folder
from mediator_cli.pipeline.forecast import Constants, Rate
from mediator_cli.pipeline.probe import (
    REPEATS,
    Spent,
    all_deltas,
    best_time,
    measure,
    open_bench,
    read_all,
    write_tiny_recipe,
)
from mediator_cli.pipeline.record import package_version
from mediator_cli.pipeline.sources import tensors_by_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from mediator_cli.pipeline.forecast import Cache
    from mediator_cli.plan.model import Plan

_NOTE = "calibration"
_BASICS = (DIGEST, read_step(USUAL), Step("copy", USUAL))
_WARM = 0.9
"""Share of the sources that has to be in memory for them to count as such."""
_CALM = 0.8
"""Share of a core below which other programs disturb what is measured."""
_EXPERTS, _ROUNDS = 4, 8
"""What all cores read to be compared with one: long enough that threads do not start and end alone."""


@dataclass(frozen=True)
class Machine:
    """What was measured so far, as in Constants; `disks` has bytes a second by `read` or `write` and device."""

    start: float
    crowding: float
    busy: float
    rates: Mapping[str, Rate]
    disks: Mapping[str, float]


def constants_for(plan: Plan, target: Path, notify: Callable[[str], None], *, anew: bool = False) -> Constants:
    """Give what a forecast of a plan needs; measures what no plan before needed, and all with `anew`."""
    key, known = machine_key(), None
    if not anew:
        known = read_machine(key)
    steps = [step for step in (*_BASICS, *list_steps(plan)) if known is None or step.key not in known.rates]
    machine = known
    if machine is None or steps:
        notify(f"measuring {'what this recipe needs' if machine else 'this machine'} once, a few seconds")
        machine = _measured(machine, steps, notify)
    source, folder = largest_source(plan), existing_folder(target)
    machine = replace(machine, disks={**_disks(source, folder), **machine.disks})
    if machine != known:
        write_note(_NOTE, key, json.dumps(asdict(machine)))
    return Constants(
        rates=machine.rates,
        start=machine.start,
        cores=os.cpu_count() or 1,
        crowding=machine.crowding,
        busy=machine.busy,
        read=machine.disks[_disk("read", source)],
        write=machine.disks[_disk("write", folder)],
        room=free_memory(),
    )


def machine_key() -> str:
    """Give a text that changes with all on which the constants depend: versions, processor, number of cores."""
    facts = [package_version(), version("numpy"), version("numba"), _processor(), str(os.cpu_count())]
    return fold([" ".join(facts).encode()])


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line for line in lines if line.startswith("model name")), platform.processor() or platform.machine())


def read_machine(key: str) -> Machine | None:
    """Read what was measured before; None where there is nothing, or nothing that makes sense."""
    try:
        facts: dict[str, Any] = json.loads(read_note(_NOTE, key) or "")
        rates = {name: Rate(**rate) for name, rate in facts.pop("rates").items()}
        disks = {str(name): float(rate) for name, rate in facts.pop("disks").items()}
        return Machine(**{name: float(value) for name, value in facts.items()}, rates=rates, disks=disks)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _measured(known: Machine | None, steps: Iterable[Step], notify: Callable[[str], None]) -> Machine:
    """Measure steps, and the machine itself where nothing is known of it.

    Steps are measured in processor time. Where other programs leave one worker less than a core, the clock tells
    nothing: workers then count as always busy, and the start as long as its processor time.
    """
    workers = os.cpu_count() or 1
    with tempfile.TemporaryDirectory(prefix="mediator-") as folder, open_bench(Path(folder), workers) as bench:
        rates = {step.key: measure(bench, step) for step in steps}
        if known is not None:
            return replace(known, rates={**known.rates, **rates})
        read, parts = all_deltas(bench, _EXPERTS)
        alone, together = (read_all(read, parts * _ROUNDS, count) for count in (1, workers))
    start, crowding = _start(), max(1.0, together.cpu / alone.cpu)
    if alone.cpu < _CALM * alone.wall:
        notify("other programs are at work: measure again with --calibrate when they are not")
        return Machine(start.cpu, crowding, 1.0, rates, {})
    return Machine(start.wall, crowding, min(1.0, together.cpu / (together.wall * workers)), rates, {})


def _start() -> Spent:
    """Time a whole merge of next to nothing, in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="mediator-") as folder:
        recipe = write_tiny_recipe(Path(folder))
        command = [sys.executable, "-m", "mediator_cli", "merge", str(recipe), "--overwrite", "--quiet"]
        environment = {**os.environ, "MEDIATOR_CACHE": folder}
        before = os.times()
        best = best_time(lambda: subprocess.run(command, env=environment, check=False, capture_output=True))
        after = os.times()
    taken = after.children_user + after.children_system - before.children_user - before.children_system
    return Spent(taken / (REPEATS + 1), best.wall)


def _disks(source: Path | None, folder: Path) -> dict[str, float]:
    return {_disk("read", source): read_rate(source), _disk("write", folder): write_rate(folder)}


def _disk(what: str, path: Path | None) -> str:
    return f"{what} {path.stat().st_dev if path else 'nothing'}"


def largest_source(plan: Plan) -> Path | None:
    """Find the largest weight file that is on disk; None where all have to be fetched first."""
    files = [file for each in tensors_by_file(plan).values() for file in each if file.is_file()]
    return max(files, key=lambda file: file.stat().st_size, default=None)


def likely_cache(plan: Plan) -> Cache:
    """Tell whether the sources are in the computer's memory; where that cannot be asked, they count as if they were."""
    files = {file for each in tensors_by_file(plan).values() for file in each if file.is_file()}
    return "warm" if cached_share(sorted(files)) >= _WARM else "cold"
