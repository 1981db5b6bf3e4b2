"""The files of one more sparse expert: its deltas from the dense expert as it lies, stored as those of the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mediator_cli.bundle.digest import digest_tensors, file_digest, sparse_digests
from mediator_cli.bundle.record import WeightFile
from mediator_cli.bundle.sparse_file import open_sparse_file, sparse_file_name
from mediator_cli.bundle.sparse_writer import create_sparse_file
from mediator_cli.checkpoint.adapter.factors import not_factors, read_factors
from mediator_cli.checkpoint.adapter.open import Adapter
from mediator_cli.checkpoint.digest import Digests
from mediator_cli.checkpoint.header import FLOAT_DTYPES, read_tensors
from mediator_cli.checkpoint.read import open_files
from mediator_cli.engine.batches import cut_shards
from mediator_cli.engine.extract.batch import Common, extract_batch
from mediator_cli.engine.extract.choose import common_limits
from mediator_cli.engine.extract.encode import Kept
from mediator_cli.engine.extract.factors import energy_of
from mediator_cli.engine.extract.item import Dense, Extraction, Item
from mediator_cli.engine.pool import run_all
from mediator_cli.engine.streams import open_streams, pieces
from mediator_cli.errors import BundleError, CheckpointError, Problem, some_names
from mediator_cli.pipeline.adapters import without_base
from mediator_cli.pipeline.change.newcomer import is_low_rank
from mediator_cli.pipeline.lineage import FAR, delta_sizes
from mediator_cli.pipeline.progress import counter
from mediator_cli.pipeline.record import SparseFiles, sparse_record
from mediator_cli.pipeline.routable import check_routing
from mediator_cli.pipeline.settings import budget_of, new_tensor
from mediator_cli.pipeline.sources import check_unchanged, identities, source_files

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from mediator_cli.bundle.exchange import Exchange
    from mediator_cli.bundle.manifest import Manifest, SparseRecord
    from mediator_cli.bundle.record import SourceFile
    from mediator_cli.checkpoint.header import TensorInfo
    from mediator_cli.engine.batches import Shard
    from mediator_cli.engine.extract.choose import Limit
    from mediator_cli.engine.streams import Piece, Streams
    from mediator_cli.pipeline.settings import Settings
    from mediator_cli.plan.model import Plan, TensorPlan


@dataclass(frozen=True)
class Extracted:
    """One more sparse expert: its record, the files of its model, and the share of its delta's energy that is kept.

    `energy` counts all tensors, also those that no expert adds to; 1 where the model is the dense expert.
    """

    record: SparseRecord
    sources: tuple[SourceFile, ...]
    energy: float
    notices: tuple[str, ...]


def extract_newcomer(change: Exchange, manifest: Manifest, plan: Plan, run: Settings) -> Extracted:
    """Write the files of a planned newcomer beside the bundle's own.

    Raises CheckpointError where its tensors hold NaN or cannot be read, OutputError when the disk refuses.
    """
    files, seen = identities(plan), Digests()
    if is_low_rank(change.folder, manifest):
        record, energy, notices = _copy_factors(change, manifest, plan)
    else:
        record, energy, notices = _prune(change, manifest, plan, seen, run)
    check_unchanged(plan, files)
    sources = source_files(without_base(plan), seen, run)[plan.experts[0].name]
    return Extracted(record, sources, energy, notices)


def _prune(
    change: Exchange, manifest: Manifest, plan: Plan, seen: Digests, run: Settings
) -> tuple[SparseRecord, float, tuple[str, ...]]:
    name = plan.experts[0].name
    dense = read_tensors(change.folder)
    job = _Job(change, manifest, plan, dense, run)
    with open_streams(plan, seen) as streams, open_files(info.file for info in dense.values()) as handles:
        doubts = _doubts(plan, streams, manifest)
        extraction = Extraction(
            {name: streams.experts[0]}, Dense(handles, dense), budget_of(plan, run).slab, streams.seed
        )
        kept = _extract(job, extraction)
        lost = _outside(job, extraction)
    record = sparse_record(plan.tensors, kept, name, _described(change, job.names_of_files(name)))
    energy = sum(each.energy for each in kept.values())
    error = sum(each.error for each in kept.values())
    return record, 1.0 - (error + lost) / (energy + lost) if energy + lost > 0 else 1.0, doubts


@dataclass(frozen=True)
class _Job:
    """What is extracted from what: the bundle, the newcomer's plan, and where the dense tensors lie."""

    change: Exchange
    manifest: Manifest
    plan: Plan
    dense: Mapping[str, TensorInfo]
    run: Settings

    @property
    def routed(self) -> frozenset[str]:
        """The tensors that experts of the bundle add to."""
        return frozenset(name for record in self.manifest.sparse for name in record.tensors)

    def shards(self) -> tuple[Shard, ...]:
        """Cut the dense tensors into files as they lie, and into batches as a merge with the newcomer does."""
        tensors = {tensor.name: tensor for tensor in self.plan.tensors}
        files = {
            shard.name: tuple(new_tensor(tensors[name]) for name in self._names_in(shard.name))
            for shard in self.manifest.shards
        }
        return cut_shards(files, tensors, len(self.manifest.experts) + 1)

    def _names_in(self, file: str) -> list[str]:
        own = [name for name, record in self.manifest.tensors.items() if record.file == file]
        return sorted(own, key=lambda name: (self.dense[name].start, own.index(name)))

    def routed_of(self, tensors: Sequence[TensorPlan]) -> list[TensorPlan]:
        """Choose the tensors that experts add to and that have entries."""
        return [tensor for tensor in tensors if tensor.name in self.routed and tensor.size]

    def names_of_files(self, expert: str) -> dict[str, str]:
        """Name the expert's files by the dense files with tensors that experts add to."""
        names = [shard.name for shard in self.shards() if self.routed_of(shard.tensors)]
        return {name: sparse_file_name(expert, at, len(names)) for at, name in enumerate(names, 1)}


def _extract(job: _Job, extraction: Extraction) -> dict[str, Kept]:
    """Write the sparse files; give what is kept of each tensor."""
    (name,), shards, workers = extraction.experts, job.shards(), budget_of(job.plan, job.run).workers
    routed = [tensor for shard in shards for tensor in job.routed_of(shard.tensors)]
    # Ranked, measured and encoded: each a pass.
    total = 3 * sum(tensor.size for tensor in routed)
    advance = counter(job.run.progress, "extract expert", total * 4, 4)
    common = Common(_limits(job, extraction, routed, workers, advance))
    kept: dict[str, Kept] = {}
    files = job.names_of_files(name)
    for shard in (shard for shard in shards if shard.name in files):
        names = [tensor.name for tensor in job.routed_of(shard.tensors)]
        with create_sparse_file(job.change.place(files[shard.name]), name, names) as writer:
            for batch in shard.batches:
                tensors = job.routed_of(batch.tensors)
                stored = extract_batch(extraction, tensors, {name: writer}, common, workers, advance)[name]
                kept |= {tensor: Kept(**facts["kept"]) for tensor, facts in stored.items()}
            writer.finish()
    advance(total)
    return kept


def _limits(
    job: _Job, extraction: Extraction, routed: Sequence[TensorPlan], workers: int, advance: Callable[[int], None]
) -> dict[tuple[str, str], Limit]:
    order = {tensor.name: at for at, tensor in enumerate(job.plan.tensors)}
    ranked = [tensor for tensor in routed if tensor.extract.over == "model"]
    return common_limits(extraction, sorted(ranked, key=lambda t: order[t.name]), workers, advance)


def _outside(job: _Job, extraction: Extraction) -> float:
    """Sum the squares of what the newcomer has where no expert adds anything: all of it is lost."""
    rest = [tensor for tensor in job.plan.tensors if tensor.name not in job.routed and tensor.dtype in FLOAT_DTYPES]
    (name,) = extraction.experts
    parts = [(tensor, piece) for tensor in rest for piece in pieces(tensor.name, tensor.size, extraction.slab)]
    squares: dict[Piece, float] = {}

    def look(part: tuple[TensorPlan, Piece]) -> None:
        tensor, piece = part
        delta = Item(extraction, name, tensor).part(piece).delta
        squares[piece] = float(np.square(delta, dtype=np.float64).sum())

    run_all(look, parts, budget_of(job.plan, job.run).workers)
    return sum(squares[piece] for _, piece in parts)


def _doubts(plan: Plan, streams: Streams, manifest: Manifest) -> tuple[str, ...]:
    (ratio,) = delta_sizes(streams, [tensor for tensor in plan.tensors if tensor.average is not None])
    if ratio <= FAR:
        return ()
    name, base = plan.experts[0].name, manifest.base.path
    return (f"expert {name} differs from the dense expert by {ratio:.0%} of its size: was it tuned from {base}?",)


def _copy_factors(change: Exchange, manifest: Manifest, plan: Plan) -> tuple[SparseRecord, float, tuple[str, ...]]:
    """Store an adapter as it is in a bundle of low-rank experts; nothing of it is pruned."""
    from mediator_cli.bundle.factors import write_factors

    expert = plan.experts[0]
    if not isinstance(expert.source, Adapter):
        message = "is a full checkpoint, and the bundle's experts are low-rank factors"
        hint = "extract an adapter first: mediator extract-lora BASE MODEL -o DIR, then add that"
        raise BundleError(Problem("--model", message, hint))
    if problems := list(not_factors(expert.source)):
        raise CheckpointError(problems)
    found = read_factors(expert.source)
    places = _open_to_factors(manifest, plan, set(found))
    own = {name: factors for name, factors in found.items() if name in places}
    if not own:
        message = "changes no tensor that experts may add to, so nothing of it would be left"
        raise BundleError(Problem("--model", message, "merge again with it: mediator merge RECIPE"))
    file = sparse_file_name(expert.name, 1, 1)
    write_factors(change.place(file), expert.name, own)
    whole = {name: energy_of(factors) for name, factors in found.items()}
    kept = {name: Kept(factors.shape[0] * factors.shape[1], 0, whole[name], 0.0) for name, factors in own.items()}
    record = sparse_record(plan.tensors, kept, expert.name, _described(change, {"": file}))
    lost = [name for name in found if name not in own]
    notices = (f"lost of expert {expert.name}, as no expert may add to it: {some_names(lost)}",) if lost else ()
    total = sum(whole.values())
    return record, sum(whole[name] for name in own) / total if total else 1.0, notices


def _open_to_factors(manifest: Manifest, plan: Plan, wanted: set[str]) -> set[str]:
    """Choose the tensors that a low-rank expert may add to: in routed units, and mixed for each input at run time.

    Where the dense expert is the base, all units are open: nothing was merged into them.
    """
    known = {name for record in manifest.sparse for name in record.tensors}
    if wanted <= known:
        return wanted
    is_base = manifest.extract is not None and manifest.extract.dense == "base"
    tensors = check_routing(plan).tensors
    routed = {t.name for t in tensors if t.mixable and (is_base or manifest.assignment.get(t.unit) == "route")}
    return wanted & (known | routed)


def _described(change: Exchange, files: Mapping[str, str]) -> SparseFiles:
    """Digest the new files."""
    records: list[WeightFile] = []
    tensors: dict[str, str] = {}
    for name in files.values():
        sparse = open_sparse_file(change.place(name))
        arrays = digest_tensors(sparse.arrays)
        tensors |= sparse_digests(sparse, arrays)
        size = sparse.file.stat().st_size
        records.append(WeightFile(name=name, bytes=size, xxh3=file_digest(sparse.file, arrays)))
    return SparseFiles(tuple(records), tensors)
