"""Check every byte of a bundle against its manifest."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mediator_cli.bundle.manifest import CONFLICTS, MANIFEST, ConflictReport, bundle_file, read_manifest, read_record
from mediator_cli.bundle.sparse_file import open_sparse_file
from mediator_cli.checkpoint.digest import CHUNK, digest_file
from mediator_cli.checkpoint.header import read_header, read_tensors
from mediator_cli.checkpoint.read import TORCH_DTYPES, bytes_view, open_files, read_bytes, read_slab
from mediator_cli.errors import MediatorError, Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from mediator_cli.bundle.manifest import FileRecord, Manifest
    from mediator_cli.checkpoint.header import TensorInfo

_DAMAGED = "fetch the bundle again or merge again"


@dataclass(frozen=True)
class Verification:
    """What was checked and what is wrong; `unknown` are files that the manifest does not name."""

    n_tensors: int
    n_sparse: int
    n_files: int
    problems: tuple[Problem, ...]
    unknown: tuple[str, ...]


def verify_bundle(folder: Path, advance: Callable[[int], None] = lambda n: None) -> Verification:
    """Check digests, shapes, dtypes, finite values, sparse experts, router and links; collect all that is wrong.

    Raises BundleError only when the manifest itself cannot be read.
    """
    manifest = read_manifest(folder)
    problems = [
        *_check_dense(folder, manifest, advance),
        *_check_sparse(folder, manifest, advance),
        *(problem for record in manifest.files for problem in _check_file(folder, record, advance)),
        *_check_router(folder, manifest, advance),
        *_check_report(folder, manifest),
    ]
    known = {record.name for record in manifest.files} | {MANIFEST}
    known |= set() if manifest.router is None else {manifest.router.file.name}
    known |= {record.file.name for record in manifest.sparse} | {tensor.file for tensor in manifest.tensors.values()}
    present = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    unknown = tuple(name for name in present if name not in known)
    return Verification(len(manifest.tensors), len(manifest.sparse), len(manifest.files), tuple(problems), unknown)


def _check_dense(folder: Path, manifest: Manifest, advance: Callable[[int], None]) -> Iterator[Problem]:
    try:
        tensors = read_tensors(folder)
    except MediatorError as error:
        yield from error.problems
        return
    for name in dict.fromkeys([*manifest.tensors, *tensors]):
        place = f"{folder}: {name}"
        if name not in tensors or name not in manifest.tensors:
            where = "the weight files" if name not in tensors else "the manifest"
            yield Problem(place, f"is missing in {where}", _DAMAGED)
            continue
        record, info = manifest.tensors[name], tensors[name]
        if (info.dtype, info.shape, info.file.name) != (record.dtype, record.shape, record.file):
            yield Problem(
                place, f"is {info.dtype} {list(info.shape)}, not {record.dtype} {list(record.shape)}", _DAMAGED
            )
            continue
        yield from _check_tensor(place, info, record.sha256, advance)


def _check_tensor(place: str, info: TensorInfo, expected: str, advance: Callable[[int], None]) -> Iterator[Problem]:
    digest, is_finite = hashlib.sha256(), True
    dtype = TORCH_DTYPES.get(info.dtype, torch.uint8)
    with open_files([info.file]) as descriptors:
        for start in range(0, info.n_bytes, CHUNK):
            chunk = read_bytes(descriptors, info, start, min(start + CHUNK, info.n_bytes))
            digest.update(bytes_view(chunk))
            is_finite &= not dtype.is_floating_point or bool(torch.isfinite(chunk.view(dtype)).all())
            advance(len(chunk))
    if not is_finite:
        yield Problem(place, "holds NaN or infinite values", _DAMAGED)
    if digest.hexdigest() != expected:
        yield Problem(place, "its bytes are not those that were written", _DAMAGED)


def _check_sparse(folder: Path, manifest: Manifest, advance: Callable[[int], None]) -> Iterator[Problem]:
    for record in manifest.sparse:
        faults = list(_check_file(folder, record.file, advance))
        yield from faults
        if not faults:
            yield from _check_sparse_file(bundle_file(folder, record.file.name), manifest)


def _check_sparse_file(file: Path, manifest: Manifest) -> Iterator[Problem]:
    try:
        sparse = open_sparse_file(file)
        for name, spec in sparse.tensors.items():
            dense = manifest.tensors.get(name)
            if dense is None or dense.shape != spec.shape:
                yield Problem(f"{file}: {name}", "fits no dense tensor", _DAMAGED)
            elif not torch.isfinite(sparse.read(name).values).all():
                yield Problem(f"{file}: {name}", "holds NaN or infinite values", _DAMAGED)
    except MediatorError as error:
        yield from error.problems


def _check_router(folder: Path, manifest: Manifest, advance: Callable[[int], None]) -> Iterator[Problem]:
    if manifest.router is None:
        return
    faults = list(_check_file(folder, manifest.router.file, advance))
    yield from faults
    names = {source.name for source in manifest.experts}
    if unknown := [name for name in manifest.router.experts if name not in names]:
        yield Problem(f"{folder / MANIFEST} router.experts", f"no expert {', '.join(unknown)}", _DAMAGED)
    if not faults:
        yield from _check_finite(bundle_file(folder, manifest.router.file.name))


def _check_finite(file: Path) -> Iterator[Problem]:
    try:
        with open_files([file]) as descriptors:
            for info in read_header(file).tensors:
                if not torch.isfinite(read_slab(descriptors, info, 0, info.size)).all():
                    yield Problem(f"{file}: {info.name}", "holds NaN or infinite values", _DAMAGED)
    except MediatorError as error:
        yield from error.problems


def _check_file(folder: Path, record: FileRecord, advance: Callable[[int], None]) -> Iterator[Problem]:
    path = bundle_file(folder, record.name)
    if not path.is_file():
        yield Problem(str(path), "is missing", _DAMAGED)
        return
    if digest_file(path, advance) != record.sha256:
        yield Problem(str(path), "its bytes are not those that were written", _DAMAGED)


def _check_report(folder: Path, manifest: Manifest) -> Iterator[Problem]:
    if manifest.conflict is None or not (folder / CONFLICTS).is_file():
        return
    try:
        read_record(folder / CONFLICTS, ConflictReport, "conflict report")
    except MediatorError as error:
        yield from error.problems
