"""What the sources are: which files, whether they are as they were, and their digests."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from mediator_cli.bundle.digest import file_digest, scan_tensors
from mediator_cli.bundle.record import SourceFile
from mediator_cli.checkpoint.cache import read_note, write_note
from mediator_cli.checkpoint.digest import fold
from mediator_cli.checkpoint.header import TensorInfo, identity, read_header
from mediator_cli.errors import CheckpointError, Problem
from mediator_cli.pipeline.progress import counter

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from mediator_cli.checkpoint.digest import Digests
    from mediator_cli.pipeline.settings import Settings
    from mediator_cli.plan.model import Plan

_NOTES = "digests"
_SHA256 = re.compile(r"[0-9a-f]{64}")


def tensors_by_file(plan: Plan) -> dict[str, dict[Path, list[TensorInfo]]]:
    """List the weight files of base and experts, with the tensors in them, by source name.

    Those with an expert's second moments are files of the expert.
    """
    owners = {"base": plan.base.tensors.values(), **{expert.name: expert.infos for expert in plan.experts}}
    found: dict[str, dict[Path, list[TensorInfo]]] = {}
    for name, infos in owners.items():
        found[name] = {}
        for info in infos:
            found[name].setdefault(info.file, []).append(info)
    return found


def identities(plan: Plan) -> dict[str, list[int | str]]:
    """Tell what shows that a weight file was changed: its size in bytes and time of change or marks, by path."""
    files = {file for group in tensors_by_file(plan).values() for file in group}
    return {str(file): identity(file) for file in sorted(files)}


def check_unchanged(plan: Plan, before: Mapping[str, Sequence[int | str]]) -> None:
    """Raise CheckpointError if a weight file was changed since `identities` told what they were."""
    changed = [path for path, facts in identities(plan).items() if facts != before.get(path)]
    if changed:
        message = "was changed while it was merged"
        raise CheckpointError([Problem(path, message, "merge again with --overwrite") for path in changed])


def known_digest(file: Path) -> SourceFile | None:
    """Find the digest of a weight file without reading it: in its name in the Hub's cache, or noted when last read."""
    known = identity(file)
    size = int(known[0])
    blob = file.resolve().name
    if _SHA256.fullmatch(blob):
        return SourceFile(name=file.name, bytes=size, sha256=blob)
    try:
        noted = json.loads(read_note(_NOTES, _key(file)) or "{}")
        if noted["identity"] == known and noted["path"] == str(file.resolve()):
            return SourceFile(name=file.name, bytes=size, xxh3=str(noted["xxh3"]))
    except (ValueError, KeyError, TypeError):
        return None
    return None


def source_files(plan: Plan, seen: Digests, run: Settings) -> dict[str, tuple[SourceFile, ...]]:
    """Give the digests of all weight files by source; only tensors that did not pass by as a whole are read now."""
    groups = tensors_by_file(plan)
    infos = {file: each for files in groups.values() for file, each in files.items()}
    found = {file: known_digest(file) for file in infos}
    unknown = {file: _all_tensors(file, infos[file]) for file in infos if found[file] is None}
    unread = [info for file, each in unknown.items() for info in each if info.name not in seen.of(file)]
    if unread:
        advance = counter(run.progress, "digest sources", sum(info.n_bytes for info in unread))
        scans = scan_tensors(unread, run.workers, advance, finite=False)
        for info, scan in zip(unread, scans, strict=True):
            seen.add(info.file, info.name, scan.digest)
    noted = {file: found[file] or _digest(file, unknown[file], seen) for file in infos}
    return {name: tuple(noted[file] for file in files) for name, files in groups.items()}


def _all_tensors(file: Path, infos: Sequence[TensorInfo]) -> Sequence[TensorInfo]:
    """List the tensors of a file, those that the merge does not need as well where its header tells of them."""
    return read_header(file).tensors if file.suffix == ".safetensors" else infos


def _digest(file: Path, infos: Sequence[TensorInfo], seen: Digests) -> SourceFile:
    """Fold the digests of a file's tensors, with its header if that is one of safetensors."""
    digests = seen.of(file)
    if file.suffix == ".safetensors":
        xxh3 = file_digest(file, digests)
    else:
        ordered = sorted(infos, key=lambda info: (info.start, info.name))
        xxh3 = fold(bytes.fromhex(digests[info.name]) for info in ordered)
    note = {"path": str(file.resolve()), "identity": identity(file), "xxh3": xxh3}
    write_note(_NOTES, _key(file), json.dumps(note))
    return SourceFile(name=file.name, bytes=int(identity(file)[0]), xxh3=xxh3)


def _key(file: Path) -> str:
    return fold([str(file.resolve()).encode()])


def changed_sources(
    one: Mapping[str, tuple[SourceFile, ...]], other: Mapping[str, tuple[SourceFile, ...]]
) -> list[str]:
    """Name the sources whose files differ in number, size or any digest that both know."""
    return [name for name in one if not _same(one[name], other.get(name, ()))]


def _same(files: tuple[SourceFile, ...], others: tuple[SourceFile, ...]) -> bool:
    if len(files) != len(others):
        return False
    for file, other in zip(files, others, strict=True):
        pairs = [(file.sha256, other.sha256), (file.xxh3, other.xxh3)]
        if file.bytes != other.bytes or any(a and b and a != b for a, b in pairs):
            return False
    return True
