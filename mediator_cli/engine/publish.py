"""A folder that appears whole or not at all: built beside its place with a journal, then renamed."""

from __future__ import annotations

import fcntl
import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mediator_cli.checkpoint.write import sync, sync_tree, write_error
from mediator_cli.engine.journal import (
    Journal,
    forget_journal,
    has_journal,
    is_of,
    may_overwrite,
    open_journal,
    start_journal,
)
from mediator_cli.engine.team import Alone
from mediator_cli.errors import OutputError, Problem

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from contextlib import AbstractContextManager
    from pathlib import Path

    from mediator_cli.engine.team import Team

MANIFESTS = (
    "routing_manifest.json", "adapter_manifest.json", "heterogeneous_manifest.json", "compression.json", "export.json",
)  # fmt: skip
"""Files that show that a folder was made here, so that it may be replaced."""
Mode = Literal["new", "overwrite", "resume"]
"""What may stand at the output: nothing; a bundle or an interrupted merge, which goes; a merge that is gone on with."""


@dataclass(frozen=True)
class Building:
    """The folder that becomes the bundle, and the journal of what is finished in it."""

    folder: Path
    journal: Journal


def check_output(target: Path, mode: Mode) -> None:
    """Raise OutputError if `target`, or an interrupted merge into it, stands in the way of a new bundle."""
    try:
        stands = target.exists() or target.is_symlink()
        notes = _beside(target, "journal")
        is_begun = has_journal(notes) and Journal(notes).any_finished()
        replaces = mode == "overwrite" or (mode == "resume" and may_overwrite(notes))
    except OSError as error:
        raise write_error(target, error) from None
    if stands:
        _check_replaceable(target, replaces=replaces)
    if is_begun and mode == "new":
        message = "an interrupted merge into this folder can go on"
        raise OutputError(Problem(str(target), message, "give --resume, or --overwrite to throw its work away"))


def _check_replaceable(target: Path, *, replaces: bool) -> None:
    if not target.is_dir() or target.is_symlink():
        raise OutputError(Problem(str(target), "exists and is not a folder", "choose another output"))
    is_empty = not any(target.iterdir())
    is_bundle = any((target / name).is_file() for name in MANIFESTS)
    if is_empty or (replaces and is_bundle):
        return
    if replaces:
        message = "exists and is not a bundle, so it is not overwritten"
        raise OutputError(Problem(str(target), message, "choose another output or remove it by hand"))
    raise OutputError(Problem(str(target), "exists", "choose another output with -o, or give --overwrite"))


def publish(
    target: Path, mode: Mode, key: Mapping[str, Any], team: Team | None = None
) -> AbstractContextManager[Building]:
    """Give a folder to build in; on success it becomes `target` by a rename, which the first process of a team does.

    On failure it stays, with its journal, if a step is finished, and goes otherwise.
    """
    if team is None or team.is_first:
        return _lead(target, mode, key, team or Alone())
    return _follow(target, key, team)


@contextmanager
def _lead(target: Path, mode: Mode, key: Mapping[str, Any], team: Team) -> Iterator[Building]:
    check_output(target, mode)
    building, notes, board = _beside(target, "partial"), _beside(target, "journal"), _beside(target, "team")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock(notes, building)
    except OSError as error:
        raise write_error(building, error) from None
    keep = True
    try:
        with _taking_part(team, board):
            _recover(target)
            check_output(target, mode)
            journal = _begin(building, notes, mode, key)
            try:
                team.gather()
                yield Building(building, journal)
            finally:
                keep = journal.any_finished()
        sync_tree(building)
        _swap(building, target)
        keep = False
    except OSError as error:
        raise write_error(building, error) from None
    finally:
        _clear(*([board] if keep else [board, building, notes]))
        os.close(lock)


@contextmanager
def _follow(target: Path, key: Mapping[str, Any], team: Team) -> Iterator[Building]:
    building = _beside(target, "partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _taking_part(team, _beside(target, "team")):
            journal = open_journal(_beside(target, "journal"), key, team.member)
            team.gather()
            yield Building(building, journal)
    except OSError as error:
        raise write_error(building, error) from None


@contextmanager
def _taking_part(team: Team, board: Path) -> Iterator[None]:
    """Meet the other processes and, however it ends, tell them how."""
    error: BaseException | None = None
    try:
        team.meet(board)
        yield
    except BaseException as raised:
        error = raised
        raise
    finally:
        team.leave(error)


def _beside(target: Path, what: str) -> Path:
    return target.parent / f".{target.name}.{what}"


def _clear(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _lock(notes: Path, building: Path) -> int:
    """Take the journal's folder, which is the lock itself; refuse where another process works in it."""
    notes.mkdir(exist_ok=True)
    lock = os.open(notes, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Another merge may have ended, and removed the folder, after it was opened here.
        if os.path.samestat(os.fstat(lock), notes.stat()):
            return lock
    except OSError:
        pass
    os.close(lock)
    message = "another merge is writing this output"
    raise OutputError(Problem(str(building), message, "wait for it or choose another output"))


def _begin(building: Path, notes: Path, mode: Mode, key: Mapping[str, Any]) -> Journal:
    """Go on with the work that stands, or clear what a dead process left and begin anew."""
    if mode == "resume" and _can_go_on(notes, building):
        return open_journal(notes, key)
    forget_journal(notes)
    _clear(building)
    building.mkdir()
    return start_journal(notes, key, overwrites=mode == "overwrite")


def can_resume(target: Path, key: Mapping[str, Any] | None = None) -> bool:
    """Whether interrupted work on `target`, where a key is given that of this key, can be gone on with."""
    notes = _beside(target, "journal")
    return _can_go_on(notes, _beside(target, "partial")) and (key is None or is_of(notes, key))


def _can_go_on(notes: Path, building: Path) -> bool:
    # Where the journal stands alone, the merge was killed after its bundle was renamed into place.
    return has_journal(notes) and building.is_dir()


def _recover(target: Path) -> None:
    """Put back the bundle that a merge had moved aside when it was killed between its two renames."""
    if _beside(target, "old").is_dir() and not target.exists():
        _beside(target, "old").rename(target)


def _swap(building: Path, target: Path) -> None:
    """Rename into place; an old bundle steps aside first and goes only when the new one stands."""
    old = _beside(target, "old")
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
