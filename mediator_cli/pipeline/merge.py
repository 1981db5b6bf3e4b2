"""From a plan to a finished bundle: conflict, assign, average, extract, manifest, publish."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mediator_cli.bundle.manifest import CONFLICTS, EXPERTS_FOLDER, MANIFEST, ROUTER, FileRecord, to_json
from mediator_cli.checkpoint.digest import digest_file
from mediator_cli.checkpoint.read import open_files
from mediator_cli.checkpoint.source import weight_files
from mediator_cli.checkpoint.write import NewTensor, index_json, plan_shards
from mediator_cli.engine.combine import DenseTensor, write_dense
from mediator_cli.engine.digest import digest_files, digest_tensors
from mediator_cli.engine.extract import Dense, Extraction, extract_expert
from mediator_cli.engine.pool import map_ordered, single_threaded_kernels
from mediator_cli.engine.publish import check_output, publish
from mediator_cli.engine.statistics import Found, find_statistics, group_by_method
from mediator_cli.engine.streams import RUNTIME_BYTES, make_budget, open_streams
from mediator_cli.errors import OutputError, Problem
from mediator_cli.pipeline.assign import assign_plan
from mediator_cli.pipeline.conflicts import conflict_passes, measure_conflicts, reuse_report, scores_by_measure
from mediator_cli.pipeline.download import download_weights, free_bytes
from mediator_cli.pipeline.lineage import check_lineage
from mediator_cli.pipeline.progress import Progress, counter, silent, unheard
from mediator_cli.pipeline.record import Outcome, make_manifest, model_card
from mediator_cli.pipeline.routable import check_routing
from mediator_cli.pipeline.router import add_router, prepare_router
from mediator_cli.pipeline.side_files import write_json, write_side_files
from mediator_cli.recipe.sizes import parse_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from mediator_cli.bundle.manifest import ConflictReport, Manifest, RouterRecord
    from mediator_cli.checkpoint.header import TensorInfo
    from mediator_cli.engine.extract import Kept
    from mediator_cli.engine.streams import Budget, Streams
    from mediator_cli.pipeline.router import RouterJob
    from mediator_cli.plan.model import Plan, TensorPlan
    from mediator_cli.stages.assign import Decision

DEFAULT_MEMORY = 2 << 30
_TRANSFORMERS_BYTES = 150 << 20
_READ_RATE = 2
"""Bytes of one stored element, for progress in bytes; most checkpoints are 16-bit."""


@dataclass(frozen=True)
class Settings:
    """How to run: output rules, memory in bytes, worker threads, where progress and early notices go."""

    overwrite: bool = False
    memory: int = DEFAULT_MEMORY
    workers: int = os.cpu_count() or 1
    progress: Progress = silent
    slab: int | None = None
    notify: Callable[[str], None] = unheard


def output_folder(plan: Plan, output: Path | None) -> Path:
    """Choose the bundle's folder: the one given, the recipe's output.path, or one named after the recipe, here."""
    written = plan.loaded.recipe.output.path
    if output is not None:
        return output.absolute()
    return plan.loaded.resolve(written) if written else Path.cwd() / plan.loaded.path.stem


def analyze_conflicts(plan: Plan, settings: Settings | None = None) -> ConflictReport:
    """Measure how much the experts of a plan disagree, without merging."""
    run = settings or Settings()
    if len(plan.experts) < 2:
        place = plan.loaded.place("experts")
        raise OutputError(Problem(place, "conflict needs at least two experts", "add an expert"))
    download_weights(plan, run.progress)
    with open_streams(plan) as streams, single_threaded_kernels():
        _doubts(plan, streams, run)
        return _measure(plan, streams, budget_of(plan, run), digest_sources(plan, run), run)


def merge(
    plan: Plan, output: Path | None = None, conflicts: Path | None = None, settings: Settings | None = None
) -> Path:
    """Carry a plan out and return the finished bundle's folder.

    Nothing appears at the output before all of it is written. Raises MediatorError for what the user can mend.
    """
    run = settings or Settings()
    given, plan = plan, check_routing(plan)
    for notice in plan.notices[len(given.notices) :]:
        run.notify(notice)
    target = output_folder(plan, output)
    check_output(target, run.overwrite)
    _check_space(plan, target)
    budget, job = budget_of(plan, run), prepare_router(plan)
    download_weights(plan, run.progress, target, dense_bytes(plan))
    with publish(target, run.overwrite) as folder:
        with open_streams(plan) as streams, single_threaded_kernels():
            doubts = _doubts(plan, streams, run)
            sources = digest_sources(plan, run)
            report = _report(plan, streams, budget, sources, conflicts, run)
            scores = scores_by_measure(plan, report) if report else {}
            assignment = assign_plan(plan, scores)
            dense = _write_dense(plan, streams, folder, assignment, budget, run)
            kept = _write_experts(plan, streams, folder, assignment, dense, budget, run)
        write_side_files(plan, folder)
        if report is not None:
            (folder / CONFLICTS).write_text(to_json(report), encoding="utf-8")
        router, notices = _write_router(folder, job, bool(kept), run)
        outcome = Outcome(target.name, sources, report, assignment, dense, kept, router, (*doubts, *notices))
        _write_records(plan, folder, outcome, run)
    return target


def _doubts(plan: Plan, streams: Streams, run: Settings) -> tuple[str, ...]:
    """Tell of experts that seem to be no fine-tunes of the base, before the long work begins."""
    doubts = tuple(check_lineage(plan, streams))
    for doubt in doubts:
        run.notify(doubt)
    return doubts


def budget_of(plan: Plan, run: Settings) -> Budget:
    """Choose how much runs at a time, so that it fits in the memory that is given."""
    budget = make_budget(len(plan.experts), run.workers, run.memory, resident_bytes(plan))
    return budget if run.slab is None else replace(budget, slab=run.slab)


def resident_bytes(plan: Plan) -> int:
    """Estimate the memory before anything is read; transformers tells what can be routed, so it is there too."""
    return RUNTIME_BYTES + (0 if plan.loaded.recipe.assign.rule == "none" else _TRANSFORMERS_BYTES)


def dense_bytes(plan: Plan) -> int:
    """Count the bytes of the dense expert's tensors."""
    return sum(_new(tensor).n_bytes for tensor in plan.tensors)


def _check_space(plan: Plan, target: Path) -> None:
    free, needed = free_bytes(target), dense_bytes(plan)
    if free < needed:
        message = f"the disk has {free / 1e9:.2f} GB free, the dense model alone needs {needed / 1e9:.2f} GB"
        raise OutputError(Problem(str(target), message, "free some space or choose another output with -o"))


def digest_sources(plan: Plan, run: Settings) -> dict[str, tuple[FileRecord, ...]]:
    """Digest all weight files of base and experts, by source name."""
    owners = {"base": weight_files(plan.base.tensors)}
    owners |= {expert.name: weight_files(expert.tensors) for expert in plan.experts}
    files = [file for group in owners.values() for file in group]
    sizes = {file: file.stat().st_size for file in files}
    digests = digest_files(files, run.workers, counter(run.progress, "digest sources", sum(sizes.values())))
    return {
        name: tuple(FileRecord(name=file.name, bytes=sizes[file], sha256=digests[file]) for file in group)
        for name, group in owners.items()
    }


def _per_element(plan: Plan) -> int:
    return (len(plan.experts) + 1) * _READ_RATE


def _report(
    plan: Plan,
    streams: Streams,
    budget: Budget,
    sources: dict[str, tuple[FileRecord, ...]],
    conflicts: Path | None,
    run: Settings,
) -> ConflictReport | None:
    if conflicts is not None:
        return reuse_report(plan, conflicts, sources)
    if plan.loaded.recipe.assign.rule == "none" or len(plan.experts) < 2:
        return None
    return _measure(plan, streams, budget, sources, run)


def _measure(
    plan: Plan, streams: Streams, budget: Budget, sources: dict[str, tuple[FileRecord, ...]], run: Settings
) -> ConflictReport:
    total = sum(tensor.size for tensor in plan.tensors) * conflict_passes(plan.loaded.recipe.conflict.denoise)
    advance = counter(run.progress, "measure conflict", total * _per_element(plan), _per_element(plan))
    return measure_conflicts(plan, streams, budget, advance, sources)


def _new(tensor: TensorPlan) -> NewTensor:
    return NewTensor(tensor.name, tensor.dtype, tensor.shape)


def _write_dense(
    plan: Plan, streams: Streams, folder: Path, assignment: dict[str, Decision], budget: Budget, run: Settings
) -> dict[str, TensorInfo]:
    keeps_base = plan.loaded.recipe.extract.dense == "base"
    tensors = [DenseTensor(t, keeps_base and t.mixable and assignment[t.unit] == "route") for t in plan.tensors]
    averaged = {tensor.plan.name for tensor in tensors if not tensor.from_base}
    # Thresholds over the model are over all tensors of a method, routed or not, so that they never depend on routing.
    groups = [g for g in group_by_method(plan.tensors) if any(t.name in averaged for t in g.tensors)]
    found: Found = {}
    total = sum(group.n_read for group in groups)
    advance = counter(run.progress, "rank deltas", total * _per_element(plan), _per_element(plan)) if total else None
    for group in groups:
        found |= find_statistics(streams, group, budget, advance or (lambda n: None))
    shards = plan_shards([_new(tensor) for tensor in plan.tensors], parse_size(plan.loaded.recipe.output.shard_size))
    total = sum(tensor.size for tensor in plan.tensors)
    advance = counter(run.progress, "average", total * _per_element(plan), _per_element(plan))
    infos = write_dense(streams, tensors, {folder / n: s for n, s in shards.items()}, found, budget, advance)
    if len(shards) > 1:
        write_json(folder / "model.safetensors.index.json", index_json(shards))
    return {tensor.name: infos[tensor.name] for tensor in plan.tensors}


def _write_experts(
    plan: Plan,
    streams: Streams,
    folder: Path,
    assignment: dict[str, Decision],
    dense: dict[str, TensorInfo],
    budget: Budget,
    run: Settings,
) -> dict[str, dict[str, Kept]]:
    routed = [t for t in plan.tensors if assignment[t.unit] == "route" and t.can_be_routed]
    if not routed:
        return {}
    (folder / EXPERTS_FOLDER).mkdir()
    total = sum(tensor.size for tensor in routed) * len(plan.experts) * _READ_RATE
    advance = counter(run.progress, "extract experts", total, _READ_RATE)
    with open_files(info.file for info in dense.values()) as descriptors:

        def one(index: int) -> dict[str, Kept]:
            name = plan.experts[index].name
            open_dense = Dense(descriptors, dense)
            job = Extraction(name, streams.experts[index], open_dense, budget.slab, streams.seed)
            return extract_expert(job, routed, folder / EXPERTS_FOLDER / f"{name}.safetensors", advance)

        results = map_ordered(one, range(len(plan.experts)), budget.workers)
        return dict(zip([expert.name for expert in plan.experts], results, strict=True))


def _write_router(
    folder: Path, job: RouterJob | None, is_routed: bool, run: Settings
) -> tuple[RouterRecord | None, tuple[str, ...]]:
    if job is None:
        return None, ()
    if not is_routed:
        return None, ("no router is fitted: no unit is routed",)
    n_bytes = sum(len(text.encode()) for texts in job.prompts.values() for text in texts)
    advance = counter(run.progress, "fit router", n_bytes)
    fitted = add_router(folder, job)
    advance(n_bytes)
    return fitted


def _write_records(plan: Plan, folder: Path, outcome: Outcome, run: Settings) -> Manifest:
    advance = counter(run.progress, "digest bundle", sum(info.n_bytes for info in outcome.dense.values()))
    digests = digest_tensors(outcome.dense, run.workers, advance)
    sparse = [folder / EXPERTS_FOLDER / f"{name}.safetensors" for name in outcome.kept]
    sparse_digests = {file.stem: digest for file, digest in digest_files(sparse, run.workers, lambda n: None).items()}
    (folder / "README.md").write_text(model_card(plan, outcome), encoding="utf-8")
    weights = {info.file for info in outcome.dense.values()} | {*sparse, folder / ROUTER}
    others = sorted(file for file in folder.rglob("*") if file.is_file() and file not in weights)
    records = tuple(_file_record(folder, file) for file in others)
    manifest = make_manifest(plan, outcome, folder, digests, sparse_digests, records)
    (folder / MANIFEST).write_text(to_json(manifest), encoding="utf-8")
    return manifest


def _file_record(folder: Path, file: Path) -> FileRecord:
    return FileRecord(name=file.relative_to(folder).as_posix(), bytes=file.stat().st_size, sha256=digest_file(file))
