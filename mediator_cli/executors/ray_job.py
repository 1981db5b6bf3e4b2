"""Ray: a driver that starts one task for each process of a team, and starts the team anew when a worker dies.

What travels through Ray are the recipe, the settings and, back, whether it went well; tensors stay in the shared
folder, as with `rank`.
"""

from __future__ import annotations

import secrets
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from mediator_cli.checkpoint.hub.collections import collection_lister
from mediator_cli.checkpoint.hub.find import Access
from mediator_cli.engine.pool import keep_freed_memory
from mediator_cli.engine.publish import can_resume
from mediator_cli.errors import MediatorError, OutputError, Problem
from mediator_cli.executors.place import PATIENCE, Place
from mediator_cli.executors.rank import share_merge
from mediator_cli.pipeline.download import plan_with_unseen
from mediator_cli.pipeline.merge import merge
from mediator_cli.pipeline.progress import silent, unheard
from mediator_cli.pipeline.settings import Settings
from mediator_cli.recipe.load import parse_partly

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

_STARTS = 4
"""How often a team is started before a dying worker is taken for a fault of its own."""


@dataclass(frozen=True)
class Job:
    """A merge as it travels to the workers; `recipe` is the absolute path from which relative ones are meant.

    `output` is the bundle's folder, on a disk that all workers share. `threads` None: as many as fit on the nodes.
    `again` goes on with what a worker that died had begun, if it had.
    """

    recipe: Path
    text: str
    changes: tuple[str, ...]
    output: Path
    conflicts: Path | None
    overwrite: bool
    resume: bool
    memory: int
    threads: int | None = None
    offline: bool = False
    patience: float = PATIENCE
    again: bool = False


@dataclass(frozen=True)
class Cluster:
    """A cluster, None for that of RAY_ADDRESS or a local one, and how many workers, None for one a node."""

    address: str | None = None
    workers: int | None = None


@dataclass(frozen=True)
class _Shape:
    world: int
    threads: int


def merge_on_ray(job: Job, cluster: Cluster, notify: Callable[[str], None] = unheard) -> None:
    """Carry a merge out on a cluster; `notify` hears of workers that died.

    Raises OutputError without the package ray, or where no cluster answers, and what a worker raises of MediatorError.
    """
    ray = _ray()
    with _connected(ray, cluster.address):
        shape = _shape(ray.nodes(), cluster.workers, job.threads)
        for start in range(1, _STARTS + 1):
            dead = _run_team(ray, job, shape)
            if not dead:
                return
            if start < _STARTS:
                notify(f"{dead}; the workers start again and go on from the last finished step")
            job = replace(job, again=True)
    raise OutputError(Problem("--executor ray", f"{dead}, {_STARTS} times", "see Ray's logs; --resume goes on"))


def work(job: Job, place: Place, threads: int) -> tuple[Problem, ...]:
    """Carry out one process's part of a job; return what a user can mend, which is none if it went well."""
    try:
        keep_freed_memory()
        access = Access(job.offline)
        loaded = parse_partly(job.recipe, job.text, job.changes, collection_lister(access))
        plan = plan_with_unseen(loaded, access, silent)
        resume = job.resume or (job.again and can_resume(job.output))
        run = Settings(overwrite=job.overwrite, resume=resume, memory=job.memory, workers=threads)
        merge(plan, job.output, job.conflicts, share_merge(plan, run, place, job.patience))
    except MediatorError as error:
        return error.problems
    return ()


def _ray() -> Any:  # noqa: ANN401 - a package that may be missing
    try:
        return import_module("ray")
    except ImportError:
        message = "the package ray is not installed"
        raise OutputError(Problem("--executor ray", message, "pip install 'mediator-merge[ray]'")) from None


@contextmanager
def _connected(ray: Any, address: str | None) -> Iterator[None]:  # noqa: ANN401
    """Connect to a cluster, or start one here; a program that is connected already stays so."""
    if ray.is_initialized():
        yield
        return
    try:
        ray.init(address=address, log_to_driver=False, include_dashboard=None if address else False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        message = f"no cluster answers: {str(error).splitlines()[0]}"
        raise OutputError(Problem(f"--address {address}", message, "start one with `ray start --head`")) from None
    try:
        yield
    finally:
        ray.shutdown()


def _shape(nodes: Sequence[dict[str, Any]], workers: int | None, threads: int | None) -> _Shape:
    """Choose how many workers, and threads for each, so that all find a node at the same time."""
    cores = [int(node["Resources"].get("CPU", 0)) for node in nodes if node["Alive"]]
    cores = [count for count in cores if count]
    world = workers or len(cores)
    if threads is None:
        options = range(max(cores, default=0), 0, -1)
        threads = next((count for count in options if _room(cores, count) >= world), 1)
    if _room(cores, threads) < world or not world:
        message = f"{world} workers of {threads} CPUs do not fit on nodes of {', '.join(map(str, cores)) or 'no'} CPUs"
        hint = "all have to run at the same time: give less with --ray-workers or --workers"
        raise OutputError(Problem("--executor ray", message, hint))
    return _Shape(world, threads)


def _room(cores: Sequence[int], threads: int) -> int:
    return sum(count // threads for count in cores)


def _run_team(ray: Any, job: Job, shape: _Shape) -> str:  # noqa: ANN401
    """Start all processes and wait for their end; return what killed one, or "" when the bundle stands."""
    run, rank = secrets.token_hex(8), 0
    remote = ray.remote(work).options(num_cpus=shape.threads, max_retries=0, scheduling_strategy="SPREAD")
    places = [Place(rank, shape.world, run) for rank in range(shape.world)]
    waiting = {remote.remote(job, place, shape.threads): place.rank for place in places}
    problems: list[tuple[Problem, ...]] = []
    ended_well = False
    try:
        while waiting:
            (done,), _ = ray.wait(list(waiting), num_returns=1)
            rank = waiting.pop(done)
            found = ray.get(done)
            problems.append(found)
            ended_well |= rank == 0 and not found
    except ray.exceptions.RayTaskError:
        raise
    except ray.exceptions.RayError as error:
        # Process 0 ends last of those whose work it needs.
        return "" if ended_well else f"worker {rank} died ({type(error).__name__})"
    finally:
        _end(ray, list(waiting))
    _raise_first(problems)
    return ""


def _end(ray: Any, tasks: list[Any]) -> None:  # noqa: ANN401
    """Kill what still runs, and wait until it is dead: two teams must not write into one folder."""
    for task in tasks:
        ray.cancel(task, force=True)
    if tasks:
        ray.wait(tasks, num_returns=len(tasks))


def _raise_first(problems: Sequence[tuple[Problem, ...]]) -> None:
    """Raise what went wrong, rather than what other processes say of it."""
    found = [each for each in problems if each]
    if found:
        raise OutputError(next((each for each in found if not each[0].place.startswith("process ")), found[0]))
