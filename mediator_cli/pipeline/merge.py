"""From a plan to a finished bundle: survey, assign, average, extract, manifest, publish."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mediator_cli.bundle.digest import digest_tensors, file_digest, sparse_digests
from mediator_cli.bundle.manifest import CONFLICTS, MANIFEST, ROUTER, to_json
from mediator_cli.bundle.record import FileRecord, WeightFile
from mediator_cli.bundle.sparse_file import SHARED, open_sparse_file
from mediator_cli.checkpoint.adapter.open import Adapter
from mediator_cli.checkpoint.digest import Digests, digest_file
from mediator_cli.checkpoint.write import index_json, plan_shards
from mediator_cli.engine.batches import cut_shards
from mediator_cli.engine.matrices import one_blas_thread
from mediator_cli.engine.publish import can_resume, check_output, publish
from mediator_cli.engine.statistics import group_by_method
from mediator_cli.engine.streams import open_streams
from mediator_cli.errors import OutputError, Problem
from mediator_cli.pipeline.adapters import merge_adapters
from mediator_cli.pipeline.align import align_sources
from mediator_cli.pipeline.assign import assign_plan
from mediator_cli.pipeline.conflicts import reuse_report, scores_by_measure
from mediator_cli.pipeline.cost import measures_conflict
from mediator_cli.pipeline.download import download_weights, free_bytes
from mediator_cli.pipeline.lineage import tell_doubts
from mediator_cli.pipeline.moe import decide_layers, made_file, write_made
from mediator_cli.pipeline.progress import counter
from mediator_cli.pipeline.record import Outcome, SparseFiles, make_manifest, model_card, package_version
from mediator_cli.pipeline.routable import check_routing
from mediator_cli.pipeline.settings import Settings, budget_of, dense_bytes, new_tensor, output_folder, row_bytes
from mediator_cli.pipeline.side_files import write_json, write_side_files
from mediator_cli.pipeline.sources import check_unchanged, identities, source_files
from mediator_cli.pipeline.survey import conflict_report, take_survey
from mediator_cli.pipeline.upload import check_output_url, output_url, prepare_staging, upload_bundle
from mediator_cli.pipeline.write import Work, carry_out_batches, sparse_files
from mediator_cli.plan.overrides import resolve_extract
from mediator_cli.recipe.sizes import parse_size

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from mediator_cli.bundle.conflict_report import ConflictReport
    from mediator_cli.bundle.router_record import RouterRecord
    from mediator_cli.engine.publish import Building
    from mediator_cli.engine.streams import Streams
    from mediator_cli.pipeline.router import RouterJob
    from mediator_cli.pipeline.survey import Survey
    from mediator_cli.plan.model import Plan, TensorPlan
    from mediator_cli.stages.assign import Decision


def merge(
    plan: Plan, output: Path | str | None = None, conflicts: Path | None = None, settings: Settings | None = None
) -> Path:
    """Carry a plan out and return the finished bundle's folder.

    Nothing appears at the output before all of it is written. What an interrupted merge had finished is kept beside it
    for a later one with `resume`. Raises MediatorError for what the user can mend.
    """
    run = settings or Settings()
    if plan.modules:
        return merge_adapters(plan, output, conflicts, run)
    plan, decided = decide_layers(plan, conflicts, run)
    conflicts = None if plan.moe else conflicts
    given, plan = plan, check_routing(plan)
    for notice in plan.notices[len(given.notices) :]:
        run.notify(notice)
    url = output_url(plan, output)
    if url is not None:
        check_output_url(url, run.mode)
    target = output_folder(plan, output) if url is None else prepare_staging(url)
    # Who asks for both wants to go on if that is possible, and to begin anew otherwise.
    mode = "overwrite" if run.overwrite and not can_resume(target) else run.mode
    check_output(target, mode)
    if mode != "resume":
        _check_space(plan, target)
    job = _prepare_router(plan) if run.team.is_first else None
    download_weights(plan, run.progress, target, dense_bytes(plan))
    files = identities(plan)
    with publish(target, mode, work_key(plan, conflicts, files), run.team) as building:
        _build(plan, building, _Given(target.name, conflicts, decided), job, run)
        check_unchanged(plan, files)
    return target if url is None else upload_bundle(target, url, run.progress)


def work_key(plan: Plan, conflicts: Path | None, files: Mapping[str, Any]) -> dict[str, Any]:
    """Tell what an interrupted merge must still be about to be gone on with: a value by what a person calls it."""
    recipe = hashlib.sha256("\0".join([plan.loaded.text, *plan.loaded.changes]).encode()).hexdigest()
    report = digest_file(conflicts) if conflicts is not None else None
    key = {"the recipe": recipe, "the conflict report": report, "mediator's version": package_version()}
    return {**key, **{f"the file {path}": facts for path, facts in files.items()}}


@dataclass(frozen=True)
class _Given:
    """What a merge is given beside the plan: its title, and a report of conflict as a file, or made for it already."""

    title: str
    conflicts: Path | None
    decided: ConflictReport | None


def _build(plan: Plan, building: Building, given: _Given, job: RouterJob | None, run: Settings) -> None:
    seen, folder = Digests(), building.folder
    aligned = align_sources(plan, run, folder)
    with open_streams(plan, seen, aligned.axes) as streams, one_blas_thread(plan.tensors):
        doubts = (*aligned.notices, *tell_doubts(plan, streams, run.notify))
        known = given.decided
        if given.conflicts is not None:
            known = reuse_report(plan, given.conflicts, source_files(plan, seen, run))
        survey = _survey(plan, streams, known, building, run)
        report = known or conflict_report(plan, survey, {})
        scores = scores_by_measure(plan, report) if report and not plan.moe else {}
        assignment = assign_plan(plan, scores)
        work = _work(plan, streams, assignment, survey, building, seen, run)
        written = carry_out_batches(work)
        work.advance(work.elements)
    if not run.team.is_first:
        return
    sources = source_files(plan, seen, run)
    if report is not None:
        report = report.model_copy(update={"sources": sources})
        (folder / CONFLICTS).write_text(to_json(report), encoding="utf-8")
    write_side_files(plan, folder)
    shards = {shard.name: shard.members for shard in work.shards}
    if plan.moe is not None:
        shards[made_file(len(work.shards))] = plan.moe.made
    if len(shards) > 1:
        write_json(folder / "model.safetensors.index.json", index_json(shards))
    router, notices = _write_router(folder, job, bool(written.kept), run)
    made = write_made(plan, plan.moe, folder, len(work.shards), run) if plan.moe is not None else None
    notices = (*doubts, *notices, *(made.notices if made else ()))
    outcome = Outcome(given.title, sources, report, assignment, written, router, notices, made)
    _write_records(plan, folder, work, outcome)
    if job is not None and written.kept:
        _ask_experts(folder, job, run)


def _prepare_router(plan: Plan) -> RouterJob | None:
    """Read the prompts; only here is what fits a router imported, which takes seconds."""
    if plan.router is None:
        return None
    from mediator_cli.pipeline.router import prepare_router

    return prepare_router(plan)


def _survey(plan: Plan, streams: Streams, given: ConflictReport | None, building: Building, run: Settings) -> Survey:
    conflict = given is None and measures_conflict(plan)
    return take_survey(plan, plan.tensors, streams, run, conflict=conflict, journal=building.journal)


def _work(
    plan: Plan,
    streams: Streams,
    assignment: Mapping[str, Decision],
    survey: Survey,
    building: Building,
    seen: Digests,
    run: Settings,
) -> Work:
    """Cut the plan into batches, and say what is done with each tensor."""
    shard_size = parse_size(plan.loaded.recipe.output.shard_size)
    files = plan_shards([new_tensor(t) for t in plan.tensors], shard_size, 1 if plan.moe else 0)
    routed = [t for t in plan.tensors if assignment[t.unit] == "route" and t.can_be_routed]
    keeps_base = plan.loaded.recipe.extract.dense == "base"
    from_base = {t.name for t in plan.tensors if keeps_base and t.mixable and assignment[t.unit] == "route"}
    averaged = [t for t in plan.tensors if t.name not in from_base]
    total = batch_elements(plan, averaged, sum(t.size for t in routed))
    return Work(
        streams=streams,
        shards=cut_shards(files, {tensor.name: tensor for tensor in plan.tensors}, plan.n_inputs),
        found=survey.found,
        routed=frozenset(tensor.name for tensor in routed),
        from_base=frozenset(from_base),
        folder=building.folder,
        journal=building.journal,
        seen=seen,
        budget=budget_of(plan, run),
        elements=total,
        advance=counter(run.progress, "merge", total * row_bytes(plan), row_bytes(plan)),
        team=run.team,
        adapters={expert.name: expert.source for expert in plan.experts if isinstance(expert.source, Adapter)},
    )


def batch_elements(plan: Plan, averaged: Sequence[TensorPlan], n_routed: int) -> int:
    """Count the elements of each source that the batches read: statistics per tensor, average, sparse experts.

    `averaged` are all tensors but those whose dense values are the base's own.
    """
    groups = [group for group in group_by_method(averaged) if not group.spans_model]
    ranked = sum(group.passes() * sum(tensor.size for tensor in group.tensors) for group in groups)
    extract = resolve_extract(plan.loaded.recipe.extract)
    passes = 2 + (extract.select == "magnitude" and extract.density != 1.0)
    if extract.mode != "sparse":
        passes = 0 if extract.mode == "factors" else 1 + (extract.mode == "emr")
    share = 2 * len(plan.experts) / (len(plan.experts) + 1)
    return ranked + sum(tensor.size for tensor in plan.tensors) + round(passes * share * n_routed)


def _check_space(plan: Plan, target: Path) -> None:
    free, needed = free_bytes(target), dense_bytes(plan)
    if free < needed:
        message = f"the disk has {free / 1e9:.2f} GB free, the dense model alone needs {needed / 1e9:.2f} GB"
        raise OutputError(Problem(str(target), message, "free some space or choose another output with -o"))


def _write_router(
    folder: Path, job: RouterJob | None, is_routed: bool, run: Settings
) -> tuple[RouterRecord | None, tuple[str, ...]]:
    if job is None:
        return None, ()
    if not is_routed:
        return None, ("no router is fitted: no unit is routed",)
    from mediator_cli.pipeline.router import add_router

    if job.settings.features.asks:
        return add_router(folder, job)
    n_bytes = _prompt_bytes(job)
    advance = counter(run.progress, "fit router", n_bytes)
    fitted = add_router(folder, job)
    advance(n_bytes)
    return fitted


def _ask_experts(folder: Path, job: RouterJob, run: Settings) -> None:
    """Let the experts of the bundle say what its router is fitted to, where it is one that asks them."""
    if not job.settings.features.asks or not job.prompts:
        return
    from mediator_cli.pipeline.router import ask_experts

    n_bytes = _prompt_bytes(job)
    advance = counter(run.progress, "ask experts", n_bytes)
    ask_experts(folder, job)
    advance(n_bytes)


def _prompt_bytes(job: RouterJob) -> int:
    return sum(len(text.encode()) for texts in job.prompts.values() for text in texts)


def _write_records(plan: Plan, folder: Path, work: Work, outcome: Outcome) -> None:
    """Write model card and manifest, the manifest last."""
    sparse = {name: _sparse_files(work, name) for name in outcome.written.kept}
    shared = _sparse_files(work, SHARED)
    (folder / "README.md").write_text(model_card(plan, outcome), encoding="utf-8")
    shards: dict[str, WeightFile] = {}
    for shard in work.shards:
        digests = {tensor.name: outcome.written.dense[tensor.name] for tensor in shard.tensors}
        shards |= dict.fromkeys(digests, _weight_file(folder, shard.name, digests))
    if (made := outcome.made) is not None:
        shards |= dict.fromkeys(made.digests, _weight_file(folder, made.file, made.digests))
    # The manifest of a merge that was killed when it had written it may stand there.
    weights = {folder / record.name for record in shards.values()} | {folder / ROUTER, folder / MANIFEST}
    weights |= {folder / record.name for files in (*sparse.values(), shared) for record in files.files}
    others = sorted(file for file in folder.rglob("*") if file.is_file() and file not in weights)
    records = tuple(_file_record(folder, file) for file in others)
    manifest = make_manifest(plan, outcome, shards, sparse, shared, records)
    (folder / MANIFEST).write_text(to_json(manifest), encoding="utf-8")


def _sparse_files(work: Work, expert: str) -> SparseFiles:
    """Digest the files of one sparse expert, or of what experts share, which were written out of order."""
    records: list[WeightFile] = []
    tensors: dict[str, str] = {}
    for name in sparse_files(work, expert).values():
        sparse = open_sparse_file(work.folder / name)
        arrays = digest_tensors(sparse.arrays, work.budget.workers)
        tensors |= sparse_digests(sparse, arrays)
        records.append(_weight_file(work.folder, name, arrays))
    return SparseFiles(tuple(records), tensors)


def _weight_file(folder: Path, name: str, digests: Mapping[str, str]) -> WeightFile:
    file = folder / name
    return WeightFile(name=name, bytes=file.stat().st_size, xxh3=file_digest(file, digests))


def _file_record(folder: Path, file: Path) -> FileRecord:
    return FileRecord(name=file.relative_to(folder).as_posix(), bytes=file.stat().st_size, sha256=digest_file(file))
