"""What was done, for the manifest and the model card."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Literal

from mediator_cli.bundle.card import router_card, with_block
from mediator_cli.bundle.lineage import card_facts, label, parents_of, with_facts
from mediator_cli.bundle.manifest import (
    GATED_SCHEMA_VERSION,
    LATEST_SCHEMA_VERSION,
    LIBRARY_SCHEMA_VERSION,
    SCHEMA_VERSION,
    ConflictRecord,
    ExtractRecord,
    Manifest,
    MethodRecord,
    RecipeRecord,
    SharedRecord,
    Sizes,
    SourceRecord,
    SparseRecord,
    SparseUnitRecord,
    TensorRecord,
    bundle_digest,
)
from mediator_cli.bundle.record import FileRecord
from mediator_cli.bundle.router_record import is_late
from mediator_cli.checkpoint.digest import digest_file
from mediator_cli.pipeline.conflicts import denoise_name, scores_by_measure
from mediator_cli.pipeline.settings import written_tensors
from mediator_cli.pipeline.side_files import license_of
from mediator_cli.plan.overrides import resolve_extract

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mediator_cli.bundle.conflict_report import ConflictReport
    from mediator_cli.bundle.moe import MoeRecord
    from mediator_cli.bundle.record import SourceFile, WeightFile
    from mediator_cli.bundle.router_record import RouterRecord
    from mediator_cli.checkpoint.hub.repo import HubRepo
    from mediator_cli.checkpoint.write import NewTensor
    from mediator_cli.engine.extract.encode import Kept
    from mediator_cli.pipeline.moe import Made
    from mediator_cli.pipeline.write import Written
    from mediator_cli.plan.model import ExpertSource, Plan, TensorPlan
    from mediator_cli.recipe.load import LoadedRecipe
    from mediator_cli.stages.assign import Decision

_ADAPTERS = "The experts are LoRA adapters as they were trained; what is routed is the base's own in the dense expert."


@dataclass(frozen=True)
class Outcome:
    """The bundle's title and what the stages gave: source digests, conflict, assignment, what was written.

    `notices` are those of the stages, beside the plan's.
    """

    title: str
    sources: Mapping[str, tuple[SourceFile, ...]]
    report: ConflictReport | None
    assignment: Mapping[str, Decision]
    written: Written
    router: RouterRecord | None = None
    notices: tuple[str, ...] = ()
    made: Made | None = None


@dataclass(frozen=True)
class SparseFiles:
    """The files of one sparse expert, and the digests of its tensors."""

    files: tuple[WeightFile, ...]
    tensors: Mapping[str, str]


def package_version() -> str:
    """Return the installed version, or `unknown` when run from a bare checkout."""
    try:
        return version("mediator-merge")
    except PackageNotFoundError:
        return "unknown"


def make_manifest(
    plan: Plan,
    outcome: Outcome,
    shards: Mapping[str, WeightFile],
    sparse: Mapping[str, SparseFiles],
    shared: SparseFiles,
    files: tuple[FileRecord, ...],
) -> Manifest:
    """Gather everything that a reader of the bundle may ask; `shards` are by the name of a tensor in them."""
    recipe = plan.loaded.recipe
    written = written_tensors(plan)
    dense = sum(tensor.n_bytes for tensor in written)
    one_model = sum(info.n_bytes for info in plan.base.tensors.values()) if plan.moe else dense
    digests = {**outcome.written.dense, **(outcome.made.digests if outcome.made else {})}
    return Manifest(
        schema_version=_version_of(plan, outcome),
        generator=f"mediator {package_version()}",
        recipe=recipe_record(plan),
        base=_source(plan, outcome, "base", recipe.base),
        experts=tuple(_expert(plan, outcome, expert) for expert in plan.experts),
        tokenizer=recipe.tokenizer,
        seed=recipe.seed,
        methods=tuple(method_records(plan)),
        conflict=_conflict(plan, outcome.report),
        assignment=dict(outcome.assignment),
        extract=_extract(plan) if sparse else None,
        sparse=tuple(
            sparse_record(plan.tensors, outcome.written.kept[name], name, files) for name, files in sparse.items()
        ),
        shared=SharedRecord(files=shared.files, tensors=dict(shared.tensors)) if shared.files else None,
        shards=tuple(dict.fromkeys(shards.values())),
        tensors={tensor.name: _tensor(tensor, shards[tensor.name], digests[tensor.name]) for tensor in written},
        files=files,
        sizes=Sizes(
            dense=dense,
            sparse=sum(file.bytes for each in (*sparse.values(), shared) for file in each.files),
            full_models=one_model * len(plan.experts),
        ),
        digest=bundle_digest(digests, {name: each.tensors for name, each in sparse.items()}, shared.tensors),
        router=outcome.router,
        moe=outcome.made.record if outcome.made else None,
        averaged_in_routed_units=_unmixed(plan, outcome),
        notices=(*plan.notices, *outcome.notices),
    )


def _version_of(plan: Plan, outcome: Outcome) -> Literal[2, 3, 4, 5]:
    if outcome.written.kept and plan.loaded.recipe.extract.mode == "factors":
        return LIBRARY_SCHEMA_VERSION
    if outcome.made is not None or is_late(outcome.router):
        return LATEST_SCHEMA_VERSION
    return GATED_SCHEMA_VERSION if _is_gated(plan, outcome) else SCHEMA_VERSION


def _is_gated(plan: Plan, outcome: Outcome) -> bool:
    """Whether any tensor is stored in another way than sparsely, or would be."""
    modes = {tensor.extract.mode for tensor in plan.tensors if outcome.assignment[tensor.unit] == "route"}
    return bool(outcome.written.kept) and (modes != {"sparse"} or _extract(plan).mode != "sparse")


def _unmixed(plan: Plan, outcome: Outcome) -> tuple[str, ...]:
    routed = [t for t in plan.tensors if outcome.assignment[t.unit] == "route" and t.average is not None]
    return tuple(tensor.name for tensor in routed if not tensor.mixable)


def recipe_record(plan: Plan) -> RecipeRecord:
    """Keep the recipe as it was read, and what the command line changed."""
    loaded = plan.loaded
    digest = recipe_digest(loaded)
    return RecipeRecord(name=_text(loaded.path.name), text=loaded.text, sha256=digest, changes=loaded.changes)


def recipe_digest(loaded: LoadedRecipe) -> str:
    """Digest a recipe's text with what the command line changed, and with the experts that it did not name itself."""
    is_listed = any(field[-1] == "from" for field in loaded.written.values())
    named = [f"{expert.name}={expert.model}" for expert in loaded.recipe.experts] if is_listed else []
    return hashlib.sha256("\0".join([loaded.text, *loaded.changes, *named]).encode()).hexdigest()


def _text(name: str) -> str:
    """Write a file name that may not be valid UTF-8 as text."""
    return name.encode("utf-8", "replace").decode()


def _source(plan: Plan, outcome: Outcome, name: str, path: str) -> SourceRecord:
    return SourceRecord(
        name=name,
        kind="full",
        path=path,
        weight=None,
        license=license_of(plan.base.path),
        files=outcome.sources[name],
        revision=commit_of(plan.base.repo),
    )


def _expert(plan: Plan, outcome: Outcome, expert: ExpertSource) -> SourceRecord:
    spec = next(spec for spec in plan.loaded.recipe.experts if spec.name == expert.name)
    prompts = None
    if expert.prompts is not None:
        digest = digest_file(expert.prompts)
        prompts = FileRecord(name=spec.prompts or "", bytes=expert.prompts.stat().st_size, sha256=digest)
    return SourceRecord(
        name=expert.name,
        kind=expert.kind,
        path=spec.model,
        weight=expert.weight,
        license=license_of(expert.source.path),
        files=outcome.sources[expert.name],
        prompts=prompts,
        revision=commit_of(expert.source.repo),
    )


def commit_of(repo: HubRepo | None) -> str | None:
    """Tell which commit of a repository on the Hub a source is; None for a folder."""
    return repo.commit if repo is not None else None


def method_records(plan: Plan) -> Iterator[MethodRecord]:
    """List the methods of a plan with all parameters and the number of tensors that each merges."""
    # A parameter that changes over the layers is one row, as it was written.
    used = [(t.average.method.name, t.average.written) for t in plan.tensors if t.average is not None]
    keys = [f"{name} {sorted(parameters.items())}" for name, parameters in used]
    for key, (name, parameters) in dict(zip(keys, used, strict=True)).items():
        yield MethodRecord(method=name, parameters=parameters, n_tensors=keys.count(key))


def _conflict(plan: Plan, report: ConflictReport | None) -> ConflictRecord | None:
    if report is None:
        return None
    spec = plan.loaded.recipe.conflict
    scores = scores_by_measure(plan, report)
    return ConflictRecord(measure=spec.measure, unit=spec.unit, denoise=denoise_name(spec.denoise), scores=scores)


def _extract(plan: Plan) -> ExtractRecord:
    spec = plan.loaded.recipe.extract
    resolved = asdict(resolve_extract(spec))
    if spec.mode == "factors":
        resolved["values"] = "factors"
    return ExtractRecord(dense=spec.dense, **resolved)


def sparse_record(
    tensors: Sequence[TensorPlan], kept: Mapping[str, Kept], name: str, files: SparseFiles
) -> SparseRecord:
    """Describe a sparse expert by its files and by what it keeps of each unit of these tensors."""
    members: dict[str, list[str]] = {}
    for tensor in tensors:
        if tensor.name in kept:
            members.setdefault(tensor.unit, []).append(tensor.name)
    sizes = {tensor.name: tensor.size for tensor in tensors}
    units = {
        unit: _unit_record([kept[n] for n in names], sum(sizes[n] for n in names)) for unit, names in members.items()
    }
    return SparseRecord(expert=name, files=files.files, tensors=dict(files.tensors), units=units)


def _unit_record(kept: list[Kept], n_entries: int) -> SparseUnitRecord:
    energy, error = sum(k.energy for k in kept), sum(k.error for k in kept)
    share = 1.0 - error / energy if energy > 0 else 1.0
    return SparseUnitRecord(n_kept=sum(k.n_kept for k in kept), n_entries=n_entries, energy=round(share, 6))


def _tensor(tensor: NewTensor, shard: WeightFile, digest: str) -> TensorRecord:
    return TensorRecord(file=shard.name, dtype=tensor.dtype, shape=tensor.shape, xxh3=digest)


def model_card(plan: Plan, outcome: Outcome) -> str:
    """Write the bundle's README: lineage, licences, how it was made and how it is loaded."""
    recipe = plan.loaded.recipe
    folders = {"base": plan.base.path, **{e.name: e.source.path for e in plan.experts}}
    written = {"base": recipe.base, **{spec.name: spec.model for spec in recipe.experts}}
    licenses = {name: license_of(path) or "not declared" for name, path in folders.items()}
    rows = [f"| {name} | {label(written[name])} | {licenses[name]} |" for name in folders]
    lines = [
        "---",
        "library_name: transformers",
        "tags: [merge, mediator]",
        "---",
        f"# {_text(outcome.title)}",
        "",
        _made_of(plan),
        "",
        "| source | from | licence |",
        "|---|---|---|",
        *rows,
        "",
        _mixed(outcome.made.record) if outcome.made else _assigned(outcome),
        *([_ADAPTERS] if outcome.written.kept and recipe.extract.mode == "factors" else []),
        "",
        f"`AutoModelForCausalLM.from_pretrained` on this folder gives the {'MoE' if plan.moe else 'dense expert'}.",
        "`routing_manifest.json` holds recipe, sources with digests, conflict scores and assignment; `mediator verify`",
        "checks every byte.",
        "",
        "```yaml",
        plan.loaded.text.rstrip("\n"),
        "```",
    ]
    if plan.loaded.changes:
        lines += ["", "Changed on the command line: " + ", ".join(f"`{c}`" for c in plan.loaded.changes)]
    sources = (_source(plan, outcome, "base", recipe.base), *(_expert(plan, outcome, e) for e in plan.experts))
    card = with_facts("\n".join(lines) + "\n", card_facts(parents_of(sources)))
    return card if outcome.router is None else with_block(card, "router", router_card(outcome.router))


def _assigned(outcome: Outcome) -> str:
    routed = [unit for unit, decision in outcome.assignment.items() if decision == "route"]
    text = f"{len(outcome.assignment) - len(routed)} units are averaged, {len(routed)} are routed"
    return text + (f": {', '.join(routed)}." if routed else ".")


def _mixed(record: MoeRecord) -> str:
    """Say how many experts answer, where, and how they are chosen."""
    return (
        f"{len(record.experts)} experts ({', '.join(record.experts)}) in {len(record.layers)} layers, "
        f"{record.experts_per_token} of them for each token: {record.n_parameters / 1e6:.0f}M parameters, "
        f"{record.n_active / 1e6:.0f}M active. Gates: {record.gates.method}. `mediator gates` shows who answers what."
    )


def _made_of(plan: Plan) -> str:
    if plan.moe is not None:
        return f"A Mixture of Experts ({plan.moe.format.name}), made with mediator from fine-tunes of one base."
    if plan.inputs:
        return f"{len(plan.layers)} layers, stacked with mediator from those of {len(plan.experts) + 1} models."
    return f"Merged with mediator from {len(plan.experts)} experts of one base."
