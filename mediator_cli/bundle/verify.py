"""Check every byte of a bundle against its manifest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from mediator_cli.bundle.checksum import fits_checksum
from mediator_cli.bundle.conflict_report import ConflictReport
from mediator_cli.bundle.digest import file_digest, in_threads, scan_tensors, sparse_digests, unheard
from mediator_cli.bundle.entries import check_entries, check_shares
from mediator_cli.bundle.manifest import (
    CONFLICTS,
    MANIFEST,
    bundle_digest,
    bundle_file,
    file_names,
    read_manifest,
    read_record,
)
from mediator_cli.bundle.sparse_file import SHARED, open_sparse_file
from mediator_cli.checkpoint.digest import digest_file
from mediator_cli.checkpoint.header import read_header, read_tensors
from mediator_cli.errors import MediatorError, Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
    from pathlib import Path

    from mediator_cli.bundle.digest import Scan
    from mediator_cli.bundle.manifest import Manifest, SharedRecord, SparseRecord, TensorRecord
    from mediator_cli.bundle.record import FileRecord, WeightFile
    from mediator_cli.bundle.sparse_file import SparseFile, SparseTensor
    from mediator_cli.checkpoint.header import TensorInfo

T = TypeVar("T")

_HINT = "fetch the bundle again or merge again"
_CHANGED = "its bytes are not those that were written"
_NOT_FINITE = "holds NaN or infinite values"


@dataclass(frozen=True)
class Verification:
    """What was checked and what is wrong; `unknown` are files that the manifest does not name."""

    n_tensors: int
    n_sparse: int
    n_files: int
    problems: tuple[Problem, ...]
    unknown: tuple[str, ...]


@dataclass(frozen=True)
class _Check:
    """A bundle while it is checked; `advance` is told of the bytes read."""

    folder: Path
    manifest: Manifest
    workers: int
    advance: Callable[[int], None]


def verify_bundle(folder: Path, advance: Callable[[int], None] = unheard, workers: int = 0) -> Verification:
    """Check digests, shapes, dtypes, finite values, sparse experts, router and links; collect all that is wrong.

    Reads with some threads, one a core for 0, a little at a time. Raises BundleError only when the manifest itself
    cannot be read.
    """
    manifest = read_manifest(folder)
    check = _Check(folder, manifest, workers, advance)
    problems = [
        *_check_manifest(check),
        *_check_dense(check),
        *_check_experts(check),
        *_check_files(check, manifest.files),
        *_check_router(check),
        *_check_gates(check),
        *_check_report(check),
    ]
    known = {*file_names(manifest), MANIFEST}
    present = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    unknown = tuple(name for name in present if name not in known)
    # A broken header is met with and without the index.
    found = tuple(dict.fromkeys(problems))
    return Verification(len(manifest.tensors), len(manifest.sparse), len(manifest.files), found, unknown)


def _check_manifest(check: _Check) -> Iterator[Problem]:
    file, manifest = check.folder / MANIFEST, check.manifest
    if not fits_checksum(file.read_bytes().decode(errors="replace"), manifest.checksum):
        yield Problem(str(file), _CHANGED, _HINT)
    dense = {name: record.xxh3 for name, record in manifest.tensors.items()}
    shared = manifest.shared.tensors if manifest.shared else {}
    if bundle_digest(dense, {record.expert: record.tensors for record in manifest.sparse}, shared) != manifest.digest:
        yield Problem(f"{file} digest", "does not fit the digests of its tensors", _HINT)


def _check_dense(check: _Check) -> Iterator[Problem]:
    try:
        # As other programs find the tensors: through the index, if there is one.
        read_tensors(check.folder)
    except MediatorError as error:
        yield from error.problems
    shards = check.manifest.shards
    headers, problems = _open_files(check, shards, read_header)
    yield from problems
    found = dict.fromkeys(info.name for header in headers.values() for info in header.tensors)
    is_complete = len(headers) == len(shards)
    yield from _compare_names(str(check.folder), check.manifest.tensors, found, is_complete)
    for shard in shards:
        if shard.name in headers:
            yield from _check_shard(check, shard, headers[shard.name].tensors)


def _open_files(
    check: _Check, files: Sequence[WeightFile], read: Callable[[Path], T]
) -> tuple[dict[str, T], list[Problem]]:
    """Read the headers of files, by name; tell what is wrong with the others."""
    opened: dict[str, T] = {}
    problems: list[Problem] = []
    for file in files:
        path = bundle_file(check.folder, file.name)
        try:
            if path.is_file():
                opened[file.name] = read(path)
            else:
                problems.append(Problem(str(path), "is missing", _HINT))
        except MediatorError as error:
            problems += error.problems
    return opened, problems


def _compare_names(place: str, known: Collection[str], found: Collection[str], is_complete: bool) -> Iterator[Problem]:
    """Compare the tensors of the manifest with those of the files; without all files, some are missing anyhow."""
    for name in known:
        if is_complete and name not in found:
            yield Problem(f"{place}: {name}", "is missing in the weight files", _HINT)
    for name in found:
        if name not in known:
            yield Problem(f"{place}: {name}", "is missing in the manifest", _HINT)


def _check_shard(check: _Check, shard: WeightFile, tensors: Sequence[TensorInfo]) -> Iterator[Problem]:
    records, path = check.manifest.tensors, bundle_file(check.folder, shard.name)
    known = [info for info in tensors if info.name in records]
    faults = {info.name: _fault_of_form(check.folder, info, records[info.name]) for info in known}
    yield from (fault for fault in faults.values() if fault)
    right = [info for info in known if not faults[info.name]]
    try:
        scans = scan_tensors(right, check.workers, check.advance)
    except MediatorError as error:
        yield from error.problems
        return
    for info, scan in zip(right, scans, strict=True):
        yield from _check_scan(f"{check.folder}: {info.name}", scan, records[info.name].xxh3)
    digests = {info.name: scan.digest for info, scan in zip(right, scans, strict=True)}
    is_known = len(right) == len(tensors) and all(records[name].xxh3 == digest for name, digest in digests.items())
    # A change in a tensor was told already; what is left is the header.
    if is_known and file_digest(path, digests) != shard.xxh3:
        yield Problem(str(path), _CHANGED, _HINT)


def _fault_of_form(folder: Path, info: TensorInfo, record: TensorRecord) -> Problem | None:
    if (info.dtype, info.shape) != (record.dtype, record.shape):
        message = f"is {info.dtype} {list(info.shape)}, not {record.dtype} {list(record.shape)}"
    elif info.file.name != record.file:
        message = f"lies in {info.file.name}, not in {record.file}"
    else:
        return None
    return Problem(f"{folder}: {info.name}", message, _HINT)


def _check_scan(place: str, scan: Scan, expected: str) -> Iterator[Problem]:
    if not scan.is_finite:
        yield Problem(place, _NOT_FINITE, _HINT)
    if scan.digest != expected:
        yield Problem(place, _CHANGED, _HINT)


def _check_experts(check: _Check) -> Iterator[Problem]:
    """Check the arrays that experts share, then each expert and that it fits them."""
    shared: dict[str, SparseTensor] = {}
    if check.manifest.shared is not None:
        opened, problems = _open_files(check, check.manifest.shared.files, open_sparse_file)
        shared = {name: spec for sparse in opened.values() for name, spec in sparse.tensors.items()}
        yield from problems
        yield from _check_expert(check, SHARED, check.manifest.shared, opened, {})
    for record in check.manifest.sparse:
        opened, problems = _open_files(check, record.files, open_sparse_file)
        yield from problems
        yield from _check_expert(check, record.expert, record, opened, shared)


def _check_expert(
    check: _Check,
    expert: str,
    record: SparseRecord | SharedRecord,
    opened: Mapping[str, SparseFile],
    shared: Mapping[str, SparseTensor],
) -> Iterator[Problem]:
    found = dict.fromkeys(name for sparse in opened.values() for name in sparse.tensors)
    is_complete = len(opened) == len(record.files)
    yield from _compare_names(f"{check.folder} {expert or 'shared'}", record.tensors, found, is_complete)
    for file in record.files:
        if file.name in opened:
            yield from _check_sparse_file(check, record, file, opened[file.name], shared)


def _check_sparse_file(
    check: _Check,
    record: SparseRecord | SharedRecord,
    file: WeightFile,
    sparse: SparseFile,
    shared: Mapping[str, SparseTensor],
) -> Iterator[Problem]:
    try:
        scans = scan_tensors(list(sparse.arrays.values()), check.workers, check.advance)
        arrays = {name: scan.digest for name, scan in zip(sparse.arrays, scans, strict=True)}
        digests = sparse_digests(sparse, arrays)
    except MediatorError as error:
        yield from error.problems
        return
    changed = [name for name, digest in digests.items() if digest != record.tensors.get(name, digest)]
    yield from (Problem(f"{sparse.file}: {name}", _CHANGED, _HINT) for name in changed)
    if not changed and file_digest(sparse.file, arrays) != file.xxh3:
        yield Problem(str(sparse.file), _CHANGED, _HINT)
    broken = [name for name, scan in zip(sparse.arrays, scans, strict=True) if not scan.is_finite]
    yield from (Problem(f"{sparse.file}: {name}", _NOT_FINITE, _HINT) for name in broken)
    yield from _check_entries(check, sparse, shared)


def _check_entries(check: _Check, sparse: SparseFile, shared: Mapping[str, SparseTensor]) -> Iterator[Problem]:
    dense = check.manifest.tensors

    def one(name: str) -> tuple[Problem, ...]:
        shape = sparse.tensors[name].shape
        if name not in dense or dense[name].shape != (shape[1:] if sparse.expert == SHARED else shape):
            return (Problem(f"{sparse.file}: {name}", "fits no dense tensor", _HINT),)
        try:
            check_entries(sparse, name)
            check_shares(sparse, name, shared)
        except MediatorError as error:
            return error.problems
        return ()

    for problems in in_threads(one, list(sparse.tensors), check.workers):
        yield from problems


def _check_files(check: _Check, records: Sequence[FileRecord]) -> Iterator[Problem]:
    def one(record: FileRecord) -> tuple[Problem, ...]:
        return _check_file(check.folder, record)

    for record, problems in zip(records, in_threads(one, records, check.workers), strict=True):
        yield from problems
        check.advance(record.bytes)


def _check_file(folder: Path, record: FileRecord) -> tuple[Problem, ...]:
    path = bundle_file(folder, record.name)
    if not path.is_file():
        return (Problem(str(path), "is missing", _HINT),)
    try:
        return () if digest_file(path) == record.sha256 else (Problem(str(path), _CHANGED, _HINT),)
    except MediatorError as error:
        return error.problems


def _check_router(check: _Check) -> Iterator[Problem]:
    router = check.manifest.router
    if router is None:
        return
    faults = () if router.file is None else _check_file(check.folder, router.file)
    yield from faults
    names = {source.name for source in check.manifest.experts}
    if unknown := [name for name in router.experts if name not in names]:
        yield Problem(f"{check.folder / MANIFEST} router.experts", f"no expert {', '.join(unknown)}", _HINT)
    if not faults and router.file is not None:
        yield from _check_finite(bundle_file(check.folder, router.file.name))


def _check_gates(check: _Check) -> Iterator[Problem]:
    gates = check.manifest.gates
    if gates is None:
        return
    faults = _check_file(check.folder, gates.file)
    yield from faults
    if gates.experts != tuple(source.name for source in check.manifest.experts):
        yield Problem(f"{check.folder / MANIFEST} gates.experts", "are not the bundle's experts", _HINT)
    if not faults:
        yield from _check_finite(bundle_file(check.folder, gates.file.name))


def _check_finite(file: Path) -> Iterator[Problem]:
    try:
        tensors = read_header(file).tensors
        for info, scan in zip(tensors, scan_tensors(tensors, 1), strict=True):
            if not scan.is_finite:
                yield Problem(f"{file}: {info.name}", _NOT_FINITE, _HINT)
    except MediatorError as error:
        yield from error.problems


def _check_report(check: _Check) -> Iterator[Problem]:
    if check.manifest.conflict is None or not (check.folder / CONFLICTS).is_file():
        return
    try:
        read_record(check.folder / CONFLICTS, ConflictReport, "conflict report")
    except MediatorError as error:
        yield from error.problems
