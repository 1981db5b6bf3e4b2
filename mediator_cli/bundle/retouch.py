"""Give some tensors of a finished model folder other values: of the same shapes, in the dtypes that are stored."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from mediator_cli.bundle.digest import file_digest
from mediator_cli.bundle.manifest import MANIFEST, bundle_digest, bundle_file, read_manifest, to_json
from mediator_cli.bundle.record import WeightFile
from mediator_cli.bundle.replace import put, record_of, stage
from mediator_cli.checkpoint.blocks import BLOCK
from mediator_cli.checkpoint.digest import digest_blocks, fold
from mediator_cli.checkpoint.header import FLOAT_DTYPES, read_tensors
from mediator_cli.checkpoint.read import narrow
from mediator_cli.checkpoint.write import sync, sync_tree, write_at, write_error
from mediator_cli.errors import CheckpointError, OutputError, Problem, did_you_mean
from mediator_cli.kernels.arrays import bytes_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from mediator_cli.bundle.manifest import Manifest
    from mediator_cli.checkpoint.header import TensorInfo

_STEP = 64 * BLOCK
"""Entries that are rounded and written at a time."""


@dataclass(frozen=True)
class _Change:
    """What is changed in a model folder: tensors by name, whole small files, and what the manifest notes of it."""

    tensors: Mapping[str, NDArray[Any]]
    files: Mapping[str, bytes]
    note: str
    describe: Callable[[Manifest], Manifest]


def retouch(
    folder: Path,
    target: Path,
    changed: Mapping[str, NDArray[Any]],
    *,
    files: Mapping[str, bytes] | None = None,
    note: str = "",
    describe: Callable[[Manifest], Manifest] = lambda manifest: manifest,
) -> None:
    """Make `target` a copy of a model folder in which some tensors have other values.

    `changed` is asked for each tensor once, so it may load or compute it then. Each array is of the shape that is
    stored, and is rounded to the dtype that is stored. `files` are further files, new or in the place of old ones, by
    their names in the folder. A manifest gets the new digests, `note` among its notices,
    and what `describe` changes in it besides.

    A new target appears whole or not at all. With `target` equal to `folder` the weight files that hold these tensors,
    and only they, are written beside and renamed, then the files, then the manifest. A crash leaves a folder that
    loads; between two of these renames one whose manifest names old digests, which the same call again mends.

    Raises CheckpointError for a tensor that is not there, has another shape or holds NaN or what is too large for its
    dtype, OutputError where the target exists or the disk refuses; before anything of the folder is changed.
    """
    what = _Change(changed, files or {}, note, describe)
    places = read_tensors(folder)
    _check_names(folder, places, what)
    if target.resolve() == folder.resolve():
        _in_place(folder, places, what)
    else:
        check_new(folder, target)
        _as_copy(folder, target, places, what)


def check_new(folder: Path, target: Path) -> None:
    """Raise OutputError where a changed copy of a folder cannot become `target`: it exists, or lies in the folder."""
    if target.resolve().is_relative_to(folder.resolve()):
        raise OutputError(Problem(str(target), f"lies in {folder}, which is copied", "choose another output"))
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise OutputError(Problem(str(target), "exists", "choose another output, or remove it by hand"))


def _check_names(folder: Path, places: Mapping[str, TensorInfo], what: _Change) -> None:
    for name in what.tensors:
        place = f"{folder}: {name}"
        if name not in places:
            raise CheckpointError(Problem(place, "no such tensor", did_you_mean(name, list(places))))
        if places[name].dtype not in FLOAT_DTYPES:
            message = f"is stored as {places[name].dtype}, which holds no floats"
            raise CheckpointError(Problem(place, message, "leave it as it is"))
    for name in what.files:
        bundle_file(folder, name)


def _in_place(folder: Path, places: Mapping[str, TensorInfo], what: _Change) -> None:
    staged: dict[str, Path] = {}
    digests: dict[str, str] = {}
    try:
        for file, infos in _by_file(places, what).items():
            # A link, as in a cache of the Hub, makes way for a file; what it led to stays as it was.
            staged[file.name] = file.with_name(f".{file.name}.new")
            shutil.copyfile(file, staged[file.name])
            digests |= _write(staged[file.name], infos, what)
            sync(staged[file.name])
        for name, data in what.files.items():
            staged[name] = stage(bundle_file(folder, name), data)
        if (folder / MANIFEST).is_file():
            manifest = _renewed(folder, places, what, digests)
            staged[MANIFEST] = stage(folder / MANIFEST, to_json(manifest).encode())
        put(folder, staged)
    except OSError as error:
        raise write_error(folder, error) from None
    finally:
        for file in staged.values():
            file.unlink(missing_ok=True)


def _as_copy(folder: Path, target: Path, places: Mapping[str, TensorInfo], what: _Change) -> None:
    building = target.parent / f".{target.name}.retouched"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(building, ignore_errors=True)
        # What a link leads to is copied, so that a snapshot in a cache becomes a folder of its own.
        shutil.copytree(folder, building, ignore=shutil.ignore_patterns(".*"))
        digests: dict[str, str] = {}
        for file, infos in _by_file(places, what).items():
            digests |= _write(building / file.name, infos, what)
        for name, data in what.files.items():
            (building / name).parent.mkdir(parents=True, exist_ok=True)
            (building / name).write_bytes(data)
        if (folder / MANIFEST).is_file():
            manifest = _renewed(folder, places, what, digests)
            (building / MANIFEST).write_text(to_json(manifest), encoding="utf-8")
        sync_tree(building)
        building.replace(target)
        sync(target.parent)
    except (OSError, shutil.Error) as error:
        raise _copy_error(building, error) from None
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _copy_error(building: Path, error: OSError) -> OutputError:
    # shutil.Error holds a list of what failed, each with source, target and reason.
    first = error.args[0][0] if isinstance(error, shutil.Error) and error.args and error.args[0] else None
    return write_error(building, OSError(str(first[2])) if first else error)


def _by_file(places: Mapping[str, TensorInfo], what: _Change) -> dict[Path, list[TensorInfo]]:
    found: dict[Path, list[TensorInfo]] = {}
    for name in what.tensors:
        found.setdefault(places[name].file, []).append(places[name])
    return found


def _write(file: Path, infos: Sequence[TensorInfo], what: _Change) -> dict[str, str]:
    """Write tensors over those in a copy of their file; give their digests. The header fits as it is."""
    # A copy of a file that may not be written may not either.
    file.chmod(file.stat().st_mode | 0o200)
    descriptor = os.open(file, os.O_WRONLY)
    try:
        return {info.name: _write_tensor(descriptor, file, info, what.tensors[info.name]) for info in infos}
    finally:
        os.close(descriptor)


def _write_tensor(descriptor: int, file: Path, info: TensorInfo, values: NDArray[Any]) -> str:
    place = f"{info.file}: {info.name}"
    if values.shape != info.shape or values.dtype.kind != "f":
        message = f"is {info.dtype} {list(info.shape)}; its new values are {values.dtype} {list(values.shape)}"
        raise CheckpointError(Problem(place, message, "give floats of the shape that is stored"))
    flat, digests = values.reshape(-1), []
    for start in range(0, info.size, _STEP):
        stored, is_whole = _stored(flat[start : start + _STEP], info.dtype)
        if not is_whole:
            message = f"its new values hold NaN, infinity or what is too large for {info.dtype}"
            raise CheckpointError(Problem(place, message, "nothing was changed"))
        write_at(descriptor, file, bytes_of(stored), info.start + start * stored.itemsize)
        digests.append(digest_blocks(stored))
    return fold(digests)


def _stored(values: NDArray[Any], dtype: str) -> tuple[NDArray[Any], bool]:
    if dtype == "F64":
        return values.astype(np.float64), bool(np.isfinite(values).all())
    # What is too large for float32 is told by the answer; numpy's warning would only say it again.
    with np.errstate(over="ignore"):
        return narrow(np.ascontiguousarray(values, np.float32), dtype)


def _renewed(folder: Path, places: Mapping[str, TensorInfo], what: _Change, digests: Mapping[str, str]) -> Manifest:
    """Describe the folder as it will be. The digests of all that is not changed are those of the manifest."""
    old = read_manifest(folder)
    tensors = {
        name: record.model_copy(update={"xxh3": digests[name]}) if name in digests else record
        for name, record in old.tensors.items()
    }
    known = {name: record.xxh3 for name, record in tensors.items()}
    touched = {file.name for file in _by_file(places, what)}
    shards = tuple(_shard(folder, shard, known) if shard.name in touched else shard for shard in old.shards)
    new = {name: record_of(name, data) for name, data in what.files.items()}
    records = {record.name: record for record in old.files} | new
    sparse = {record.expert: record.tensors for record in old.sparse}
    update = {
        "tensors": tensors,
        "shards": shards,
        "files": tuple(records[name] for name in sorted(records, key=PurePosixPath)),
        "digest": bundle_digest(known, sparse, old.shared.tensors if old.shared else {}),
        "notices": (*old.notices, *([what.note] if what.note else [])),
    }
    return what.describe(old.model_copy(update=update))


def _shard(folder: Path, shard: WeightFile, digests: Mapping[str, str]) -> WeightFile:
    # The old file still stands, and its header is that of the new one.
    return shard.model_copy(update={"xxh3": file_digest(folder / shard.name, digests)})
