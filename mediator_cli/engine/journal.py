"""What a merge has finished, kept beside the bundle that it builds, so that another process can go on.

A journal is a folder: `key.json` says of what work it is, and each process appends a line of JSON for each finished
step to a file of its own, after the step's bytes are safe on the disk. A file named `overwrite` says that the work may
replace the bundle that stood there when it began.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mediator_cli.checkpoint.write import sync, write_error
from mediator_cli.errors import OutputError, Problem

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

_KEY = "key.json"
_OVERWRITE = "overwrite"


@dataclass
class Journal:
    """The finished steps of all processes, by name; `write` adds one of this process."""

    folder: Path
    member: int = 0
    steps: dict[str, Any] = field(default_factory=dict)
    _places: dict[Path, int] = field(default_factory=dict)

    @property
    def file(self) -> Path:
        """The file of this process."""
        return _steps_file(self.folder, self.member)

    def write(self, step: str, facts: Mapping[str, Any]) -> None:
        """Append a finished step and wait until the disk has it."""
        try:
            with self.file.open("ab") as stream:
                stream.write(_line(step, facts))
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise write_error(self.file, error) from None
        self.steps[step] = facts

    def any_finished(self) -> bool:
        """Whether any process has finished a step."""
        return any(b"\n" in _content(file, 0) for file in _all_files(self.folder))

    def read(self) -> None:
        """Read what all processes have finished; a line that a crash cut off is no step."""
        self._read(_all_files(self.folder))

    def read_members(self, members: Iterable[int]) -> None:
        """Read what some processes have finished since the last look, without listing the folder."""
        self._read([_steps_file(self.folder, member) for member in members])

    def _read(self, files: Iterable[Path]) -> None:
        for file in files:
            whole, newline, _ = _content(file, self._places.get(file, 0)).rpartition(b"\n")
            self.steps |= {step: facts for step, facts in map(json.loads, whole.splitlines())}
            self._places[file] = self._places.get(file, 0) + len(whole + newline)


def _steps_file(folder: Path, member: int) -> Path:
    return folder / f"steps-{member:05d}.jsonl"


def _all_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("steps-*.jsonl"))


def _line(step: str, facts: Mapping[str, Any]) -> bytes:
    return (json.dumps([step, facts], separators=(",", ":")) + "\n").encode()


def _content(file: Path, start: int) -> bytes:
    """Read a file from an offset; shared folders may list a file that is gone, or not yet one that is there."""
    try:
        with file.open("rb") as stream:
            stream.seek(start)
            return stream.read()
    except FileNotFoundError:
        return b""


def start_journal(folder: Path, key: Mapping[str, Any], member: int = 0, *, overwrites: bool = False) -> Journal:
    """Begin an empty journal of the work that `key` describes."""
    staged = folder / f".{_KEY}.new"
    folder.mkdir(parents=True, exist_ok=True)
    forget_journal(folder)
    for old in folder.iterdir():
        old.unlink()
    if overwrites:
        (folder / _OVERWRITE).touch()
    staged.write_text(json.dumps(key), encoding="utf-8")
    sync(staged)
    staged.replace(folder / _KEY)
    sync(folder)
    return Journal(folder, member)


def has_journal(folder: Path) -> bool:
    """Whether a journal was begun here."""
    return (folder / _KEY).is_file()


def forget_journal(folder: Path) -> None:
    """Make sure that nobody goes on with the work of a journal, before what it tells of is removed."""
    (folder / _KEY).unlink(missing_ok=True)
    sync(folder)


def is_of(folder: Path, key: Mapping[str, Any]) -> bool:
    """Whether the journal here was begun for the work that `key` describes."""
    try:
        return bool(json.loads((folder / _KEY).read_text(encoding="utf-8")) == key)
    except (OSError, ValueError, RecursionError):
        return False


def may_overwrite(folder: Path) -> bool:
    """Whether the work of the journal here was begun to replace a bundle."""
    return has_journal(folder) and (folder / _OVERWRITE).is_file()


def open_journal(folder: Path, key: Mapping[str, Any], member: int = 0) -> Journal:
    """Open a journal to go on; raise OutputError with all that is not as it was when the work began."""
    try:
        written = json.loads((folder / _KEY).read_text(encoding="utf-8"))
        changed = [name for name in {**written, **key} if written.get(name) != key.get(name)]
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        changed = ["the journal itself, which cannot be read"]
    if changed:
        raise _not_the_same(folder, sorted(changed), member)
    journal = Journal(folder, member)
    try:
        journal.read()
    except (ValueError, TypeError, RecursionError):
        raise _not_the_same(folder, ["a step that cannot be read"], member) from None
    if member:
        journal.file.touch()
        _cut_torn_line(journal)
    else:
        _gather(journal)
    return journal


def _not_the_same(folder: Path, changed: list[str], member: int) -> OutputError:
    names = ", ".join(changed)
    if member:
        message = f"process {member} does not see what process 0 sees: {names} differ"
        hint = "give all processes the same command and recipe, and the same files on a shared folder"
        return OutputError(Problem(str(folder), message, hint))
    message = f"the interrupted merge cannot go on: {names} changed since it began"
    return OutputError(Problem(str(folder), message, "start anew with --overwrite, which throws its work away"))


def _cut_torn_line(journal: Journal) -> None:
    with journal.file.open("ab") as stream:
        stream.truncate(journal._places.get(journal.file, 0))


def _gather(journal: Journal) -> None:
    """Bring the steps of all processes into one file: those that go on may be fewer."""
    staged = journal.folder / ".steps.new"
    files = _all_files(journal.folder)
    if files and files != [journal.file]:
        staged.write_bytes(b"".join(_line(step, facts) for step, facts in journal.steps.items()))
        sync(staged)
        staged.replace(journal.file)
        sync(journal.folder)
        journal._places = {journal.file: journal.file.stat().st_size}
        for file in files:
            if file != journal.file:
                file.unlink(missing_ok=True)
    elif files:
        _cut_torn_line(journal)
