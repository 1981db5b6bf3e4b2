"""A bundle, model or adapter from the Hub to a folder: only what belongs to it, checked, and whole or not at all."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mediator_cli.bundle.manifest import MANIFEST, Manifest, file_names, read_manifest
from mediator_cli.bundle.verify import verify_bundle
from mediator_cli.checkpoint.hub.files import fetch_into, fetch_small, fetch_weights
from mediator_cli.checkpoint.hub.find import Access, find_repo, missing_file
from mediator_cli.engine.publish import can_resume, publish
from mediator_cli.errors import BundleError, CheckpointError, MediatorError, OutputError, Problem
from mediator_cli.export.hub.folder import belongs, look_into
from mediator_cli.pipeline.download import existing_folder, free_bytes
from mediator_cli.pipeline.progress import Progress, counter, silent
from mediator_cli.recipe.sizes import human_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from mediator_cli.checkpoint.hub.repo import HubRepo
    from mediator_cli.engine.publish import Building, Mode


@dataclass(frozen=True)
class Pulled:
    """What came: the folder, what it is, and at which commit; `left_out` are files of the repository that stayed."""

    source: str
    commit: str
    folder: Path
    kind: str
    names: tuple[str, ...]
    n_bytes: int
    left_out: tuple[str, ...]


def pull(
    source: str, target: Path | None, overwrite: bool = False, offline: bool = False, progress: Progress = silent
) -> Pulled:
    """Bring org/name[@revision] to a folder, or for None to the Hub's cache, and check every byte of a bundle.

    A second call after an interruption goes on where the first one stopped. Raises CheckpointError where the Hub has
    no such thing, BundleError where what came is damaged or its files would leave the folder, OutputError.
    """
    repo = _find(source, offline)
    if target is None:
        return _to_cache(repo, progress)
    key = {"the repository": repo.repo_id, "its commit": repo.commit}
    with _told(), publish(target, _mode(target, key, overwrite=overwrite), key) as building:
        names = _wanted(repo, building.folder)
        _check_space(repo, names, building.folder)
        _fetch_all(repo, names, building, progress)
        kind = _checked_or_gone(building, progress)
    return _pulled(repo, target, kind, names)


def _find(source: str, offline: bool) -> HubRepo:
    """Find a repository; that a source of a recipe may be a folder as well is of no matter here."""
    try:
        return find_repo(source, Access(offline), lambda name: name == MANIFEST)
    except CheckpointError as error:
        told = [
            replace(
                p,
                message=p.message.removeprefix("no such folder, and "),
                hint=p.hint.removeprefix("relative paths in a recipe start at the recipe's folder; "),
            )
            for p in error.problems
        ]
        raise CheckpointError(told) from None


def _mode(target: Path, key: dict[str, str], *, overwrite: bool) -> Mode:
    """Go on with a pull of the same commit; begin anew otherwise."""
    if can_resume(target, key) or (can_resume(target) and not overwrite):
        return "resume"
    return "overwrite" if overwrite else "new"


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as error:
        error.add_note("goes on: what came is kept beside the folder")
        raise


def _wanted(repo: HubRepo, folder: Path) -> list[str]:
    """List the files to fetch, the manifest last; the manifest itself is put into `folder` to be read there."""
    if MANIFEST not in repo.sizes:
        names = sorted(name for name in repo.sizes if belongs(name))
        if not any(name.endswith((".safetensors", ".gguf")) for name in names):
            hint = "name the repository of a bundle, a model or an adapter"
            raise BundleError(Problem(repo.source, "holds nothing that mediator writes", hint))
        return names
    fetch_into(repo, MANIFEST, folder / MANIFEST)
    manifest = _read_named(repo, folder)
    names = file_names(manifest)
    if hidden := [name for name in names if any(part.startswith(".") for part in name.split("/"))]:
        raise BundleError(
            Problem(repo.source, f"the manifest names a hidden file: {hidden[0]!r}", "do not use this bundle")
        )
    for name in names:
        if name not in repo.sizes:
            raise missing_file(repo, name)
    return [*names, MANIFEST]


def _read_named(repo: HubRepo, folder: Path) -> Manifest:
    """Read the manifest that came, and say of which repository it is where it can't be read."""
    try:
        return read_manifest(folder)
    except BundleError as error:
        (folder / MANIFEST).unlink(missing_ok=True)
        place = str(folder)
        told = [replace(p, place=p.place.replace(place, repo.source)) for p in error.problems]
        raise BundleError(told) from None


def _check_space(repo: HubRepo, names: list[str], folder: Path) -> None:
    there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    needed = sum(repo.sizes[name] for name in names) - there
    if (free := free_bytes(folder)) < needed:
        message = f"the disk has {human_bytes(free)} free, {human_bytes(needed)} are to come"
        raise OutputError(
            Problem(str(existing_folder(folder)), message, "free some space, or choose another place with -o")
        )


def _fetch_all(repo: HubRepo, names: list[str], building: Building, progress: Progress) -> None:
    """Fetch files in turn; those that came in an earlier call are only counted."""
    advance = counter(progress, "pull", sum(repo.sizes[name] for name in names))
    # From here on an interruption leaves something to go on with.
    building.journal.write("begun", {})
    for name in names:
        file = building.folder / name
        if name in building.journal.steps and file.is_file():
            advance(repo.sizes[name])
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        fetch_into(repo, name, file, advance)
        building.journal.write(name, {})


def _checked_or_gone(building: Building, progress: Progress) -> str:
    """Check what came; what is damaged is not kept, or the next call would go on with it."""
    try:
        return _checked(building.folder, progress)
    except MediatorError:
        building.journal.file.unlink(missing_ok=True)
        raise


def _checked(folder: Path, progress: Progress) -> str:
    """Check every byte of a bundle, or that other folders are what they seem; return what it is."""
    if (folder / MANIFEST).is_file():
        total = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        if problems := verify_bundle(folder, counter(progress, "verify", total)).problems:
            raise BundleError([replace(p, hint="ask whoever pushed it, or pull an earlier revision") for p in problems])
    return look_into(folder).kind


def _to_cache(repo: HubRepo, progress: Progress) -> Pulled:
    """Bring the files to the Hub's cache, where a snapshot is a folder like any other."""
    if MANIFEST in repo.sizes:
        fetch_small(repo, MANIFEST)
    names = file_names(read_manifest(repo.folder)) if MANIFEST in repo.sizes else sorted(filter(belongs, repo.sizes))
    advance = counter(progress, "pull", sum(repo.sizes.get(name, 0) for name in names))
    for name in names:
        if name not in repo.sizes:
            raise missing_file(repo, name)
        _fetch_cached(repo, name, advance)
    return _pulled(repo, repo.folder, _checked(repo.folder, progress), names)


def _fetch_cached(repo: HubRepo, name: str, advance: Callable[[int], None]) -> None:
    if repo.offline or (repo.folder / name).is_file():
        advance(repo.sizes[name])
    else:
        fetch_weights(repo, name, advance)


def _pulled(repo: HubRepo, folder: Path, kind: str, names: list[str]) -> Pulled:
    names = list(dict.fromkeys([*names, MANIFEST])) if MANIFEST in repo.sizes else names
    left_out = tuple(sorted(name for name in repo.sizes if name not in names and name != ".gitattributes"))
    n_bytes = sum(repo.sizes[name] for name in names)
    return Pulled(repo.source, repo.commit, folder, kind, tuple(names), n_bytes, left_out)
