"""Change which files a finished bundle has, so that a crash leaves the old bundle or the new one, never a mixture."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mediator_cli.bundle.manifest import MANIFEST, bundle_file, file_names, read_manifest, to_json
from mediator_cli.bundle.replace import put, stage
from mediator_cli.checkpoint.write import sync, write_error
from mediator_cli.errors import OutputError, Problem

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from mediator_cli.bundle.manifest import Manifest

_SCRATCH = ".exchange"
_NOTE = "files.json"


@dataclass(frozen=True)
class Exchange:
    """A bundle that is being changed, and the folder in which its new files are made, under their later names."""

    folder: Path
    scratch: Path

    def place(self, name: str) -> Path:
        """Give the place in which a new file is made; its folder is there."""
        file = bundle_file(self.scratch, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        return file

    def commit(self, manifest: Manifest, texts: Mapping[str, bytes]) -> None:
        """Put the new files and the manifest in place, then what the manifest names no more away.

        New files have names that the old manifest does not have, and the new manifest appears by one rename: that is
        the moment of change. `texts` go over files of the same name, such as the model card, right behind it; until
        then the manifest does not list them. Raises OutputError when the disk refuses, with the old bundle in place.
        """
        try:
            self._commit(manifest, texts)
        except OSError as error:
            raise write_error(self.folder, error) from None

    def _commit(self, manifest: Manifest, texts: Mapping[str, bytes]) -> None:
        old, new = file_names(read_manifest(self.folder)), file_names(manifest)
        made = [file for file in sorted(self.scratch.rglob("*")) if file.is_file()]
        names = [file.relative_to(self.scratch).as_posix() for file in made]
        if taken := sorted(set(names) & set(old)):
            raise RuntimeError(f"{taken[0]} is a file of the old bundle")
        self._note([*names, *(name for name in old if name not in new)])
        for file, name in zip(made, names, strict=True):
            sync(file)
            target = bundle_file(self.folder, name)
            target.parent.mkdir(exist_ok=True)
            file.replace(target)
        for parent in {bundle_file(self.folder, name).parent for name in names}:
            sync(parent)
        kept = tuple(record for record in manifest.files if record.name not in texts)
        self._put({MANIFEST: to_json(manifest.model_copy(update={"files": kept})).encode()})
        if texts:
            self._put(texts)
            self._put({MANIFEST: to_json(manifest).encode()})

    def _note(self, names: Sequence[str]) -> None:
        """Note the files that belong to one of the two bundles alone, for whoever cleans up."""
        put(self.scratch, {_NOTE: stage(self.scratch / _NOTE, json.dumps(list(names)).encode())})

    def _put(self, files: Mapping[str, bytes]) -> None:
        put(self.folder, {name: stage(self.scratch / name, data) for name, data in files.items()})


@contextmanager
def exchanging(folder: Path) -> Iterator[Exchange]:
    """Take a bundle for a change; clean up afterwards, and first what a change that was killed has left.

    Raises OutputError when another process is changing it, or when the disk refuses.
    """
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise write_error(folder, error) from None
    try:
        _take(lock, folder)
        try:
            clean(folder)
            scratch = folder / _SCRATCH
            scratch.mkdir()
        except OSError as error:
            raise write_error(folder, error) from None
        try:
            yield Exchange(folder, scratch)
        finally:
            clean(folder)
    finally:
        os.close(lock)


def _take(lock: int, folder: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise OutputError(Problem(str(folder), "another process is changing this bundle", "wait for it")) from None


def clean(folder: Path) -> None:
    """Remove what a change has left: its own folder, and those files noted there that the manifest does not name."""
    scratch = folder / _SCRATCH
    if not scratch.is_dir():
        return
    named = {*file_names(read_manifest(folder)), MANIFEST}
    for name in _noted(scratch):
        if name not in named:
            bundle_file(folder, name).unlink(missing_ok=True)
    shutil.rmtree(scratch)


def _noted(scratch: Path) -> list[str]:
    """Read which files belong to one of two bundles; the note is there as a whole, or nothing was moved yet."""
    note = scratch / _NOTE
    return [str(name) for name in json.loads(note.read_text())] if note.is_file() else []
