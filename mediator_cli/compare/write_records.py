"""What a bundle of a strategy says of itself: its manifest and its model card."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mediator_cli.bundle.lineage import label
from mediator_cli.bundle.manifest import (
    LATEST_SCHEMA_VERSION,
    LIBRARY_SCHEMA_VERSION,
    SCHEMA_VERSION,
    ExtractRecord,
    Manifest,
    MethodRecord,
    Sizes,
    SourceRecord,
    SparseRecord,
    SparseUnitRecord,
    TensorRecord,
    bundle_digest,
)
from mediator_cli.bundle.router_record import is_late
from mediator_cli.checkpoint.layout import unit_of
from mediator_cli.pipeline.record import commit_of, recipe_record
from mediator_cli.pipeline.side_files import license_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from mediator_cli.bundle.gates_record import GatesRecord
    from mediator_cli.bundle.record import FileRecord, WeightFile
    from mediator_cli.bundle.router_record import RouterRecord
    from mediator_cli.compare.entries import Entry
    from mediator_cli.compare.strategies_run import Contest
    from mediator_cli.pipeline.record import SparseFiles
    from mediator_cli.recipe.compare import LoadedCompare
    from mediator_cli.strategies.library import Change
    from mediator_cli.strategies.strategy import Fitted


@dataclass(frozen=True)
class Parts:
    """What a bundle of a strategy holds beside its dense model, once it is written."""

    sparse: Mapping[str, SparseFiles]
    router: RouterRecord | None
    gates: GatesRecord | None


@dataclass(frozen=True)
class Described:
    """The files of a finished folder: weights with the digests of their tensors, and all others."""

    shards: Mapping[str, WeightFile]
    digests: Mapping[str, str]
    dtypes: Mapping[str, tuple[str, tuple[int, ...], int]]
    others: tuple[FileRecord, ...]


def manifest_of(
    contest: Contest, loaded: LoadedCompare, entry: Entry, fitted: Fitted, parts: Parts, made: Described
) -> Manifest:
    """Gather all that a reader of the bundle may ask."""
    plan = contest.sources.plan
    routed = {tensor for change in fitted.experts.values() for tensor in change}
    units = {unit_of(name, "layer"): "average" for name in made.digests}
    units |= {unit_of(name, "layer"): "route" for name in routed}
    dense = sum(n_bytes for _, _, n_bytes in made.dtypes.values())
    experts = tuple(_sources(contest, loaded, fitted))
    n_changed = len(routed | {name for change in fitted.folded for name in change})
    return Manifest(
        schema_version=_version_of(parts.router, has_experts=bool(fitted.experts)),
        generator=f"mediator {contest.version}",
        recipe=recipe_record(plan),
        base=_base(contest, loaded),
        experts=experts,
        tokenizer="base",
        seed=contest.seed,
        methods=(MethodRecord(method=entry.strategy.name, parameters=dict(entry.parameters), n_tensors=n_changed),),
        conflict=None,
        assignment=dict(units),
        extract=_extract(fitted) if fitted.experts else None,
        sparse=tuple(_expert_record(name, fitted.experts[name], files) for name, files in parts.sparse.items()),
        shards=tuple(dict.fromkeys(made.shards.values())),
        tensors={
            name: TensorRecord(
                file=made.shards[name].name, dtype=made.dtypes[name][0], shape=made.dtypes[name][1], xxh3=digest
            )
            for name, digest in made.digests.items()
        },
        router=parts.router,
        gates=parts.gates,
        files=made.others,
        sizes=Sizes(
            dense=dense,
            sparse=sum(file.bytes for files in parts.sparse.values() for file in files.files),
            full_models=dense * len(experts),
        ),
        digest=bundle_digest(made.digests, {name: files.tensors for name, files in parts.sparse.items()}),
        notices=contest.sources.notices,
    )


def _version_of(router: RouterRecord | None, *, has_experts: bool) -> int:
    if has_experts:
        return LIBRARY_SCHEMA_VERSION
    return LATEST_SCHEMA_VERSION if is_late(router) else SCHEMA_VERSION


def _extract(fitted: Fitted) -> ExtractRecord:
    return ExtractRecord(
        dense="average" if fitted.folded else "base", density=1.0, select="magnitude", rescale=1.0,
        values="factors", mode="factors",
    )  # fmt: skip


def _base(contest: Contest, loaded: LoadedCompare) -> SourceRecord:
    base = contest.sources.plan.base
    return SourceRecord(
        name="base", kind="full", path=loaded.recipe.base, weight=None, license=license_of(base.path),
        files=contest.sources.files["base"], revision=commit_of(base.repo),
    )  # fmt: skip


def _sources(contest: Contest, loaded: LoadedCompare, fitted: Fitted) -> Iterator[SourceRecord]:
    """Describe the experts in the order of mixtures; where none is mixed, all that the dense model was made of.

    An expert that a strategy made of several, such as that of a cluster, has no file of its own.
    """
    written = {spec.name: spec.model for spec in loaded.recipe.experts}
    plans = {expert.name: expert for expert in contest.sources.plan.experts}
    for name in fitted.experts or contest.bench.library.experts:
        if name not in plans:
            yield SourceRecord(name=name, kind="lora", path="made of the library", weight=None, license=None, files=())
            continue
        source = plans[name]
        yield SourceRecord(
            name=name, kind=source.kind, path=written[name], weight=None, license=license_of(source.source.path),
            files=contest.sources.files[name], revision=commit_of(source.source.repo),
        )  # fmt: skip


def _expert_record(name: str, change: Change, files: SparseFiles) -> SparseRecord:
    sizes: dict[str, int] = {}
    for tensor, delta in change.items():
        unit = unit_of(tensor, "layer")
        sizes[unit] = sizes.get(unit, 0) + delta.shape[0] * delta.shape[1]
    units = {unit: SparseUnitRecord(n_kept=size, n_entries=size, energy=1.0) for unit, size in sizes.items()}
    return SparseRecord(expert=name, files=files.files, tensors=dict(files.tensors), units=units)


def card_of(contest: Contest, loaded: LoadedCompare, entry: Entry, fitted: Fitted, title: str, told: str = "") -> str:
    """Write the bundle's README: what it is, what it was made of, how well it did, and the recipe."""
    plan = contest.sources.plan
    folders = {"base": plan.base.path, **{expert.name: expert.source.path for expert in plan.experts}}
    written = {"base": loaded.recipe.base, **{spec.name: spec.model for spec in loaded.recipe.experts}}
    rows = [f"| {n} | {label(written[n])} | {license_of(folders[n]) or 'not declared'} |" for n in folders]
    given = ", ".join(f"{name} {value}" for name, value in entry.parameters.items())
    lines = [
        "---",
        "library_name: transformers",
        "tags: [merge, mediator]",
        "base_model_relation: merge",
        "---",
        f"# {title}",
        "",
        f"A library of {len(plan.experts)} adapters of one base, answered with by `{entry.strategy.name}`"
        + (f" ({given})" if given else "")
        + f": {entry.strategy.summary.rstrip('.')} (<{entry.strategy.reference}>). Made with `mediator compare`.",
        "",
        "| source | from | licence |",
        "|---|---|---|",
        *rows,
        "",
        _held(fitted),
        "",
        *([told.rstrip(), ""] if told else []),
        "`AutoModelForCausalLM.from_pretrained` on this folder gives the dense model. `routing_manifest.json` holds",
        "recipe and sources with digests; `mediator verify` checks every byte.",
        "",
        "```yaml",
        loaded.text.rstrip("\n"),
        "```",
    ]
    if loaded.changes:
        lines += ["", "Changed on the command line: " + ", ".join(f"`{c}`" for c in loaded.changes)]
    return "\n".join(lines) + "\n"


def _held(fitted: Fitted) -> str:
    dense = "The dense model is the base" + (" with what was merged into it." if fitted.folded else ", unchanged.")
    if not fitted.experts:
        return dense
    return f"{dense} {len(fitted.experts)} low-rank experts are added for each prompt: {', '.join(fitted.experts)}."
