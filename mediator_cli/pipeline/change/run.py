"""Add an expert to a finished bundle, or take one out, without touching the files of the others."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from mediator_cli.bundle.card import CARD
from mediator_cli.bundle.exchange import Exchange, exchanging
from mediator_cli.bundle.manifest import (
    LATEST_SCHEMA_VERSION,
    ROUTER,
    ChangeRecord,
    Manifest,
    SourceRecord,
    bundle_digest,
    read_manifest,
    with_router,
)
from mediator_cli.bundle.record import FileRecord
from mediator_cli.bundle.replace import record_of
from mediator_cli.checkpoint.digest import digest_file
from mediator_cli.checkpoint.hub.find import ONLINE, Access
from mediator_cli.errors import BundleError, OutputError, Problem, did_you_mean
from mediator_cli.pipeline.change.card import renewed_card
from mediator_cli.pipeline.change.extract import extract_newcomer
from mediator_cli.pipeline.change.new_router import NewRouter, no_router
from mediator_cli.pipeline.change.newcomer import (
    Newcomer,
    check_growing,
    check_name,
    check_no_gates,
    open_newcomer,
    recorded_recipe,
    same_model,
)
from mediator_cli.pipeline.download import free_bytes
from mediator_cli.pipeline.record import commit_of, package_version
from mediator_cli.pipeline.settings import Settings
from mediator_cli.pipeline.side_files import license_of
from mediator_cli.plan.prompts import read_prompts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from typing import Literal

    from mediator_cli.bundle.gates_record import GatesRecord
    from mediator_cli.bundle.manifest import SparseRecord
    from mediator_cli.pipeline.change.extract import Extracted
    from mediator_cli.plan.model import Plan
    from mediator_cli.recipe.schema import Recipe

_OTHER_ROUTER = "router-2.safetensors"


@dataclass(frozen=True)
class Changed:
    """A bundle before and after, the share of a newcomer's energy that is kept, and what is worth knowing."""

    before: Manifest
    after: Manifest
    energy: float | None
    notices: tuple[str, ...]


def add_expert(
    folder: Path,
    new: Newcomer,
    prompts: Mapping[str, Path] | None = None,
    *,
    router: bool = True,
    access: Access = ONLINE,
    run: Settings | None = None,
) -> Changed:
    """Add an expert to a bundle and to its router; the dense expert and the files of the others stay as they are.

    `prompts` are files by expert, those of the newcomer and of others whose files are no more where the manifest says.
    Without `router` the bundle has none afterwards. A crash leaves the old bundle or the new one.
    Raises MediatorError for what does not fit, with nothing changed.
    """
    run, prompts = run or Settings(), prompts or {}
    manifest = read_manifest(folder)
    check_growing(folder, manifest)
    check_no_gates(folder, manifest)
    check_name(new.name, manifest)
    manifest = _with_prompts(manifest, prompts, new.name)
    texts = read_prompts(prompts[new.name]) if new.name in prompts else None
    recipe = recorded_recipe(folder, manifest)
    plan = open_newcomer(folder, manifest, new, access, run)
    _check_space(folder, manifest)
    with exchanging(folder) as change:
        _check_same(folder, manifest)
        source = _source(plan, new, prompts.get(new.name))
        routed = _grown_router(folder, manifest, recipe, source, texts, keeps=router)
        extracted = extract_newcomer(change, manifest, plan, run)
        source = source.model_copy(update={"files": extracted.sources})
        notices = (*_notices(manifest, plan, extracted, source), *routed.notices)
        after = _grown(manifest, source, extracted)
        after = _finish(change, manifest, after, "added", source, routed, notices)
    after = _fit_later(folder, after, routed)
    return Changed(manifest, after, extracted.energy, notices)


def remove_expert(
    folder: Path, name: str, prompts: Mapping[str, Path] | None = None, *, router: bool = True
) -> Changed:
    """Take an expert out of a bundle and out of its router; the dense expert, which may hold a part of it, stays.

    `prompts` and `router` are as for `add_expert`. Raises BundleError for an expert that is not there, or the last.
    """
    manifest = read_manifest(folder)
    _check_shrinking(folder, manifest, name)
    manifest = _with_prompts(manifest, prompts or {}, None)
    with exchanging(folder) as change:
        _check_same(folder, manifest)
        routed = _shrunk_router(folder, manifest, name, keeps=router)
        source = next(source for source in manifest.experts if source.name == name)
        notices = (*_left_behind(manifest, name), *routed.notices)
        after = _shrunk(manifest, name)
        if manifest.gates is not None:
            after = after.model_copy(update={"gates": _shrunk_gates(change, manifest, name)})
        after = _finish(change, manifest, after, "removed", source, routed, notices)
    return Changed(manifest, _fit_later(folder, after, routed), None, notices)


def _check_shrinking(folder: Path, manifest: Manifest, name: str) -> None:
    known = [source.name for source in manifest.experts]
    if manifest.moe is not None:
        hint = "merge again without it: mediator merge RECIPE, with `kind: moe`"
        raise BundleError(Problem(str(folder), "is a Mixture of Experts, whose gates and layers are of its size", hint))
    if name not in known:
        raise BundleError(Problem("--name", f"no expert '{name}'", did_you_mean(name, known)))
    if not manifest.sparse:
        message = "no unit is routed: its experts are in the dense model, and none can be taken out"
        raise BundleError(Problem(str(folder), message, "merge again without it: mediator merge RECIPE"))
    if len(known) == 1:
        message = f"{name} is its last expert"
        hint = "the folder without it is the dense expert, which transformers loads as it is"
        raise BundleError(Problem(str(folder), message, hint))


def _check_same(folder: Path, manifest: Manifest) -> None:
    """Raise OutputError where another process has changed the bundle before this one could take it."""
    if read_manifest(folder).checksum != manifest.checksum:
        raise OutputError(Problem(str(folder), "was changed by another process just now", "run the command again"))


def _check_space(folder: Path, manifest: Manifest) -> None:
    largest = max(sum(file.bytes for file in record.files) for record in manifest.sparse)
    free = free_bytes(folder / "experts")
    if free < largest:
        message = f"the disk has {free / 1e9:.2f} GB free, an expert needs about {largest / 1e9:.2f} GB"
        raise OutputError(Problem(str(folder), message, "free some space"))


def _with_prompts(manifest: Manifest, prompts: Mapping[str, Path], new: str | None) -> Manifest:
    """Note the prompts given for experts of the bundle in the place of those noted already."""
    from mediator_cli.pipeline.router import prompts_record

    known = [source.name for source in manifest.experts]
    if unknown := [name for name in prompts if name not in (*known, new)]:
        raise BundleError([Problem("--prompts", f"no expert '{name}'", did_you_mean(name, known)) for name in unknown])
    for file in prompts.values():
        read_prompts(file)
    experts = tuple(
        source.model_copy(update={"prompts": prompts_record(prompts[source.name])})
        if source.name in prompts
        else source
        for source in manifest.experts
    )
    return manifest.model_copy(update={"experts": experts})


def _source(plan: Plan, new: Newcomer, prompts: Path | None) -> SourceRecord:
    from mediator_cli.pipeline.router import prompts_record

    (expert,) = plan.experts
    return SourceRecord(
        name=new.name,
        kind=expert.kind,
        path=new.model,
        # No part of the average has come from it.
        weight=0.0,
        license=license_of(expert.source.path),
        files=(),
        prompts=prompts_record(prompts) if prompts is not None else None,
        revision=commit_of(expert.source.repo),
    )


def _grown_router(
    folder: Path, manifest: Manifest, recipe: Recipe, source: SourceRecord, texts: Sequence[str] | None, *, keeps: bool
) -> NewRouter:
    if not keeps or manifest.router is None:
        return no_router(manifest.router is not None)
    # What fits a router takes seconds to import, and a bundle may have none.
    from mediator_cli.pipeline.change.routers import router_with

    return router_with(folder, manifest, recipe, source, texts)


def _shrunk_router(folder: Path, manifest: Manifest, name: str, *, keeps: bool) -> NewRouter:
    if manifest.gates is not None and manifest.router is None:
        return NewRouter(None, "gates, left without its scores")
    if not keeps or manifest.router is None:
        return no_router(manifest.router is not None)
    from mediator_cli.pipeline.change.routers import router_without

    return router_without(folder, manifest, recorded_recipe(folder, manifest), name)


def _shrunk_gates(change: Exchange, manifest: Manifest, name: str) -> GatesRecord | None:
    from mediator_cli.pipeline.change.gates import gates_without

    return gates_without(change, manifest, name)


def _notices(manifest: Manifest, plan: Plan, extracted: Extracted, source: SourceRecord) -> tuple[str, ...]:
    """Say what is worth knowing of a newcomer and of what the bundle keeps of it."""
    notices = [*plan.notices, *extracted.notices]
    if twin := same_model(manifest, source):
        notices.append(f"expert {source.name} is the same model as {twin}: their files are equal")
    if manifest.extract is not None and manifest.extract.dense == "average":
        notices.append(
            f"the dense expert stays as it was merged: {source.name} has no part in it, nor in units that are averaged"
        )
    return tuple(notices)


def _left_behind(manifest: Manifest, name: str) -> tuple[str, ...]:
    """Say what of an expert stays in a bundle; nothing of one that was added later."""
    notices: tuple[str, ...] = ()
    added = [record.source.name for record in manifest.history if record.change == "added"]
    is_average = manifest.extract is None or manifest.extract.dense == "average"
    n_averaged = list(manifest.assignment.values()).count("average")
    if name not in added and is_average:
        notices += (f"the dense expert still has its part of {name}, as it was merged",)
    elif name not in added and n_averaged and manifest.extract is not None and manifest.extract.mode != "factors":
        notices += (f"{n_averaged} units are averaged and have, as merged, whatever {name} had changed in them",)
    if manifest.shared is not None:
        notices += (f"the arrays that experts share are still made of all, {name} among them",)
    return notices


def _grown(manifest: Manifest, source: SourceRecord, extracted: Extracted) -> Manifest:
    experts, sparse = (*manifest.experts, source), (*manifest.sparse, extracted.record)
    # A low-rank expert may be the first to add to a unit.
    assignment = {**manifest.assignment, **dict.fromkeys(extracted.record.units, "route")}
    return _resized(manifest.model_copy(update={"assignment": assignment}), experts, sparse)


def _shrunk(manifest: Manifest, name: str) -> Manifest:
    experts = tuple(source for source in manifest.experts if source.name != name)
    sparse = tuple(record for record in manifest.sparse if record.expert != name)
    return _resized(manifest, experts, sparse)


def _resized(manifest: Manifest, experts: tuple[SourceRecord, ...], sparse: tuple[SparseRecord, ...]) -> Manifest:
    """Give a manifest other experts, with what follows from them: sizes and digest."""
    shared = manifest.shared
    stored = [*(record.files for record in sparse), *([shared.files] if shared else [])]
    one_model = manifest.sizes.full_models // len(manifest.experts)
    sizes = manifest.sizes.model_copy(
        update={
            "sparse": sum(file.bytes for files in stored for file in files),
            "full_models": one_model * len(experts),
        }
    )
    dense = {name: tensor.xxh3 for name, tensor in manifest.tensors.items()}
    digest = bundle_digest(dense, {r.expert: r.tensors for r in sparse}, shared.tensors if shared else {})
    return manifest.model_copy(update={"experts": experts, "sparse": sparse, "sizes": sizes, "digest": digest})


def _finish(
    change: Exchange,
    before: Manifest,
    after: Manifest,
    what: Literal["added", "removed"],
    source: SourceRecord,
    routed: NewRouter,
    notices: tuple[str, ...],
) -> Manifest:
    """Write router and card, note the change, and put everything in place."""
    record = ChangeRecord(
        change=what,
        source=source,
        router=routed.how,
        before=before.digest,
        generator=f"mediator {package_version()}",
    )
    update = {
        "history": (*before.history, record),
        "notices": (*before.notices, *(notice for notice in notices if notice not in before.notices)),
        "schema_version": LATEST_SCHEMA_VERSION,
    }
    fitted = routed.fitted
    router = fitted.record(_router_file(change, before, routed)) if fitted is not None else routed.bare
    after = with_router(after.model_copy(update=update), router)
    card, texts = change.folder / CARD, {}
    if card.is_file():
        text = renewed_card(card.read_text(encoding="utf-8", errors="replace"), before, after).encode()
        texts = {CARD: text}
        files = {file.name: file for file in after.files} | {CARD: record_of(CARD, text)}
        after = after.model_copy(update={"files": tuple(files[name] for name in sorted(files, key=PurePosixPath))})
    change.commit(after, texts)
    return read_manifest(change.folder)


def _router_file(change: Exchange, before: Manifest, routed: NewRouter) -> FileRecord | None:
    """Write the arrays of a router under a name that the old one does not have; None where it has none."""
    if routed.fitted is None or not routed.fitted.arrays:
        return None
    from mediator_cli.runtime.router import write_router

    old = before.router.file.name if before.router is not None and before.router.file is not None else ""
    name = _OTHER_ROUTER if old == ROUTER else ROUTER
    file = change.place(name)
    write_router(file, routed.fitted.arrays)
    return FileRecord(name=name, bytes=file.stat().st_size, sha256=digest_file(file))


def _fit_later(folder: Path, manifest: Manifest, routed: NewRouter) -> Manifest:
    """Fit a router that asks the experts, now that the bundle has them all."""
    if routed.later is None:
        return manifest
    from mediator_cli.pipeline.router import fit_job, put_router

    return put_router(folder, manifest, fit_job(folder, routed.later))
