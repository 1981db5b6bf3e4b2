"""Replace files of a finished bundle so that a crash never leaves a manifest that does not fit its files."""

from __future__ import annotations

import hashlib
import os
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from mediator_cli.bundle.manifest import MANIFEST, bundle_file, read_manifest, to_json, with_checksum
from mediator_cli.bundle.record import FileRecord
from mediator_cli.checkpoint.write import sync, write_error

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from mediator_cli.bundle.manifest import Manifest


def replace_files(folder: Path, manifest: Manifest, files: Mapping[str, bytes]) -> Manifest:
    """Put files, by their names in the bundle, and a manifest in the place of the old ones; return it as written.

    The manifest gets the digests of these files; that of a router it has to hold in `router` already.
    In between stands a manifest that speaks of none of these files, so that at every moment what the manifest names is
    there as it says; after a crash the bundle may have no router, and files that its manifest does not name.
    Raises OutputError when the disk refuses.
    """
    old = read_manifest(folder)
    own_record = manifest.router.file.name if manifest.router and manifest.router.file else ""
    digests = {name: record_of(name, data) for name, data in files.items() if name != own_record}
    listed = {record.name: record for record in manifest.files} | digests
    files_now = tuple(listed[name] for name in sorted(listed, key=PurePosixPath))
    new = with_checksum(manifest.model_copy(update={"files": files_now}))
    replaced = old.router is not None and old.router.file is not None and old.router.file.name in files
    router = None if replaced else old.router
    kept = tuple(record for record in old.files if record.name not in files)
    between = old.model_copy(update={"files": kept, "router": router})
    staged: dict[str, Path] = {}
    try:
        for name, data in files.items():
            staged[name] = stage(bundle_file(folder, name), data)
        _put_manifest(folder, between)
        put(folder, staged)
        _put_manifest(folder, new)
    finally:
        for file in staged.values():
            file.unlink(missing_ok=True)
    return new


def record_of(name: str, data: bytes) -> FileRecord:
    """Describe a file by what is to be in it."""
    return FileRecord(name=name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def _put_manifest(folder: Path, manifest: Manifest) -> None:
    staged = stage(folder / MANIFEST, to_json(manifest).encode())
    try:
        put(folder, {MANIFEST: staged})
    finally:
        staged.unlink(missing_ok=True)


def stage(target: Path, data: bytes) -> Path:
    """Write beside the target, through to the disk."""
    staged = target.with_name(f".{target.name}.new")
    try:
        with staged.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        staged.unlink(missing_ok=True)
        raise write_error(target, error) from None
    return staged


def put(folder: Path, staged: Mapping[str, Path]) -> None:
    """Rename staged files into place and make the renames last."""
    try:
        for name, file in staged.items():
            file.replace(folder / name)
        sync(folder)
    except OSError as error:
        raise write_error(folder, error) from None
