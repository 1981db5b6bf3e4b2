"""Weights that a plan needs and that are still on the Hub: counted, and brought into the cache."""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mediator_cli.checkpoint.hub.files import fetch_weights, partial_bytes
from mediator_cli.checkpoint.hub.find import UnseenWeights
from mediator_cli.checkpoint.source import weight_files
from mediator_cli.checkpoint.write import write_error
from mediator_cli.errors import MediatorError, OutputError, Problem
from mediator_cli.pipeline.progress import counter
from mediator_cli.plan.make import make_plan
from mediator_cli.recipe.sizes import human_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from mediator_cli.checkpoint.header import TensorInfo
    from mediator_cli.checkpoint.hub.find import Access
    from mediator_cli.checkpoint.hub.repo import HubRepo
    from mediator_cli.pipeline.progress import Progress
    from mediator_cli.plan.model import Plan
    from mediator_cli.recipe.load import LoadedRecipe

_AT_A_TIME = 4


@dataclass(frozen=True)
class FarFile:
    """A weight file that is not on disk yet."""

    repo: HubRepo
    name: str

    @property
    def n_bytes(self) -> int:
        """Its size, as the Hub says."""
        return self.repo.sizes[self.name]


def far_files(tensors: Mapping[str, TensorInfo], repo: HubRepo | None) -> tuple[FarFile, ...]:
    """List the files that hold the tensors and still have to be downloaded."""
    if repo is None:
        return ()
    return tuple(FarFile(repo, repo.name_of(file)) for file in weight_files(tensors) if not file.is_file())


def far_files_of(plan: Plan) -> dict[str, tuple[FarFile, ...]]:
    """List what a merge will download, by source; a file that two sources share belongs to the first."""
    sources = {"base": plan.base, **{expert.name: expert.source for expert in plan.experts}}
    sources |= {f"{e.name} second_moments": e.moments for e in plan.experts if e.moments is not None}
    found: dict[str, tuple[FarFile, ...]] = {}
    seen: set[Path] = set()
    for name, source in sources.items():
        files = tuple(f for f in far_files(source.tensors, source.repo) if f.repo.folder / f.name not in seen)
        seen |= {f.repo.folder / f.name for f in files}
        found |= {name: files} if files else {}
    return found


def download_weights(plan: Plan, progress: Progress, target: Path | None = None, reserved: int = 0) -> None:
    """Bring all weight files that a plan needs into the Hub's cache; what is there already is kept.

    `reserved` bytes will be written to `target` afterwards. Raises OutputError when the disk has no room for both, and
    CheckpointError when a file cannot be had.
    """
    download(tuple(file for files in far_files_of(plan).values() for file in files), progress, target, reserved)


def plan_with_unseen(loaded: LoadedRecipe, access: Access, progress: Progress) -> Plan:
    """Make a plan; where nothing but weights that can't be looked at from afar is in its way, download them first."""
    try:
        return make_plan(loaded, access)
    except MediatorError as error:
        unseen = [problem for problem in error.problems if isinstance(problem, UnseenWeights)]
        if len(unseen) < len(error.problems):
            raise
    files = (FarFile(item.repo, name) for item in unseen if item.repo is not None for name in item.names)
    download(tuple(dict.fromkeys(files)), progress)
    return make_plan(loaded, access)


def download(files: tuple[FarFile, ...], progress: Progress, target: Path | None = None, reserved: int = 0) -> None:
    """Download weight files, some at a time; the next call goes on where this one was stopped."""
    if not files:
        return
    _check_space(files, target, reserved)
    advance = counter(progress, "download", sum(file.n_bytes for file in files))
    stop = threading.Event()

    def told(n: int) -> None:
        if stop.is_set():
            raise InterruptedError
        advance(n)

    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        try:
            _all_done(pool, files, told)
        except BaseException:
            # Without this the threads would finish their files, however long that takes, before the error is told.
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _all_done(pool: ThreadPoolExecutor, files: Iterable[FarFile], told: Callable[[int], None]) -> None:
    for future in as_completed([pool.submit(fetch_weights, file.repo, file.name, told) for file in files]):
        future.result()


def free_bytes(target: Path) -> int:
    """Count the free bytes of the disk that will hold `target`."""
    try:
        return shutil.disk_usage(existing_folder(target)).free
    except OSError as error:
        raise write_error(target, error) from None


def existing_folder(target: Path) -> Path:
    """Find the folder that is there and will hold `target`; raise OutputError for a name that no disk can hold."""
    try:
        return next(folder for folder in target.absolute().parents if folder.exists())
    except OSError as error:
        raise write_error(target, error) from None


def _check_space(files: tuple[FarFile, ...], target: Path | None, reserved: int) -> None:
    storage = files[0].repo.storage
    repos = {file.repo.storage: file.repo for file in files}.values()
    needed = sum(file.n_bytes for file in files) - sum(partial_bytes(repo) for repo in repos)
    if target is not None and existing_folder(target).stat().st_dev == existing_folder(storage).stat().st_dev:
        needed += reserved
    free = free_bytes(storage)
    if free < needed:
        message = f"the disk has {human_bytes(free)} free, the downloads and the bundle need {human_bytes(needed)}"
        raise OutputError(Problem(str(storage.parent), message, "free some space, or move the cache with HF_HUB_CACHE"))
