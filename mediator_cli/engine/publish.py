"""A folder that appears whole or not at all: built beside its place, then renamed."""

from __future__ import annotations

import fcntl
import os
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mediator_cli.checkpoint.write import sync, write_error
from mediator_cli.errors import OutputError, Problem

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def check_output(target: Path, overwrite: bool) -> None:
    """Raise OutputError if `target` stands in the way of a new bundle."""
    try:
        stands = target.exists() or target.is_symlink()
    except OSError as error:
        raise write_error(target, error) from None
    if not stands:
        return
    if not target.is_dir() or target.is_symlink():
        raise OutputError(Problem(str(target), "exists and is not a folder", "choose another output"))
    is_empty = not any(target.iterdir())
    is_bundle = (target / "routing_manifest.json").is_file()
    if is_empty or (overwrite and is_bundle):
        return
    if overwrite:
        message = "exists and is not a bundle, so it is not overwritten"
        raise OutputError(Problem(str(target), message, "choose another output or remove it by hand"))
    raise OutputError(Problem(str(target), "exists", "choose another output with -o, or give --overwrite"))


@contextmanager
def publish(target: Path, overwrite: bool) -> Iterator[Path]:
    """Give a new folder to build in; on success it becomes `target` by a rename, on failure it goes."""
    check_output(target, overwrite)
    building = target.parent / f".{target.name}.partial"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = _claim(building)
    except OSError as error:
        raise write_error(building, error) from None
    is_published = False
    try:
        _recover(target)
        check_output(target, overwrite)
        yield building
        _sync_tree(building)
        _swap(building, target)
        is_published = True
    except OSError as error:
        raise write_error(building, error) from None
    finally:
        if not is_published:
            shutil.rmtree(building, ignore_errors=True)
        os.close(lock)


def _claim(building: Path) -> int:
    """Take over the folder of a merge that died; refuse that of one that lives. The folder itself is the lock."""
    building.mkdir(exist_ok=True)
    lock = os.open(building, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        message = "another merge is writing this output"
        raise OutputError(Problem(str(building), message, "wait for it or choose another output")) from None
    for child in building.iterdir():
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()
    return lock


def _sync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def _old(target: Path) -> Path:
    return target.parent / f".{target.name}.old"


def _recover(target: Path) -> None:
    """Put back the bundle that a merge had moved aside when it was killed between its two renames."""
    if _old(target).is_dir() and not target.exists():
        _old(target).rename(target)


def _swap(building: Path, target: Path) -> None:
    """Rename into place; an old bundle steps aside first and goes only when the new one stands."""
    old = _old(target)
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    try:
        building.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
    sync(target.parent)
