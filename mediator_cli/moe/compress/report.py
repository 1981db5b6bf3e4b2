"""compression.json and the model card: what was compressed, how, and what was dropped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from mediator_cli.bundle.record import Record
from mediator_cli.moe.compress.layout import Size, size_of
from mediator_cli.moe.compress.statistics_file import Calibration

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from mediator_cli.checkpoint.moe_layout import MoeLayout
    from mediator_cli.checkpoint.source import Checkpoint
    from mediator_cli.moe.compress.groups import Group
    from mediator_cli.moe.compress.job import Job
    from mediator_cli.moe.compress.statistics import LayerStatistics

REPORT = "compression.json"


class SizeRecord(Record):
    """How large a model is; `n_active` are the parameters that one token passes through."""

    n_experts: int
    top_k: int
    bytes: int
    n_parameters: int
    n_active: int


class GroupRecord(Record):
    """Experts of the source that became one, the centre first, with their merge coefficients."""

    experts: tuple[int, ...]
    weights: tuple[float, ...]
    reordered: Annotated[int, Field(description="Inner neurons of members that were put elsewhere to fit the centre.")]


class LayerRecord(Record):
    """What became of one layer's experts, and what was measured of each."""

    groups: tuple[GroupRecord, ...]
    dropped: tuple[int, ...]
    frequency: tuple[float, ...]
    saliency: tuple[float, ...]


class CompressionReport(Record):
    """All of compression.json; `experts` names the source's experts where its manifest does."""

    generator: str
    source: str
    source_digest: Annotated[str | None, Field(description="The digest of the source's manifest; null without one.")]
    experts: tuple[str, ...]
    method: str
    parameters: dict[str, Any]
    calibration: Calibration
    before: SizeRecord
    after: SizeRecord
    layers: dict[int, LayerRecord]
    tensors: Annotated[dict[str, str], Field(description="Digest of each tensor written.")]
    notices: tuple[str, ...] = ()


def size_record(size: Size) -> SizeRecord:
    """Write down a size."""
    return SizeRecord(
        n_experts=size.n_experts,
        top_k=size.top_k,
        bytes=size.n_bytes,
        n_parameters=size.n_parameters,
        n_active=size.n_active,
    )


def sizes(source: Checkpoint, layout: MoeLayout, job: Job) -> tuple[SizeRecord, SizeRecord]:
    """Say how large the model is before and after."""
    before, after = (size_of(source, layout, n) for n in (layout.n_experts, job.written(layout)))
    return size_record(before), size_record(after)


def parameters(job: Job) -> dict[str, Any]:
    """Give the settings that the job's method has."""
    found: dict[str, Any] = {"experts": job.n_experts, "router": job.router, "align": job.align}
    if job.method == "sub_moe":
        found |= {"rank": job.rank, "seed": job.seed}
    if job.method == "ream":
        found |= {"cap": job.cap, "seed": job.seed}
    return found


def layer_record(groups: tuple[Group, ...], found: LayerStatistics) -> LayerRecord:
    """Write down what became of a layer."""
    kept = {member for group in groups for member in group.members}
    return LayerRecord(
        groups=tuple(_group_record(group) for group in groups),
        dropped=tuple(expert for expert in range(found.n_experts) if expert not in kept),
        frequency=tuple(round(float(value), 6) for value in found.frequency),
        saliency=tuple(round(float(value), 6) for value in found.saliency),
    )


def _group_record(group: Group) -> GroupRecord:
    moved = sum(int((order != range(len(order))).sum()) for order in group.orders if order is not None)
    weights = tuple(round(weight, 6) for weight in group.weights)
    return GroupRecord(experts=group.members, weights=weights, reordered=moved)


def notices(job: Job, layout: MoeLayout, renormalised: bool, layers: Mapping[int, LayerStatistics]) -> Iterator[str]:
    """Say what a user should know of a compression."""
    if job.top_k(layout) < layout.top_k:
        yield f"a token gets {job.top_k(layout)} of the experts instead of {layout.top_k}: no more are left"
    if job.router == "tied":
        yield "with --router tied each member keeps its row and a copy of the merged expert, so nothing gets smaller"
    if not renormalised:
        yield "this model does not renormalise the weights of chosen experts, so they grow where rows of others go"
    unused = {layer: int((found.n_routed == 0).sum()) for layer, found in layers.items()}
    if n := sum(unused.values()):
        where = sum(count > 0 for count in unused.values())
        message = f"{n} experts in {where} layers got no calibration token; they count for nothing in the merge"
        yield f"{message}: more rows, or rows more like what the model will read, may change that"


def card(report: CompressionReport, licence: str | None) -> str:
    """Write the model card; the licence is that of the source."""
    before, after = report.before, report.after
    lines = [
        "---",
        *([f"license: {licence}"] if licence else []),
        "library_name: transformers",
        "tags: [moe, merge, mediator]",
        "---",
        f"# {report.source.rstrip('/').rpartition('/')[2]}, {after.n_experts} of {before.n_experts} experts",
        "",
        f"Compressed by {report.method} with `mediator compress-moe`, calibrated on "
        f"{report.calibration.n_tokens} tokens. `compression.json` says what became of each expert of each layer.",
        "",
        "| | before | after |",
        "|---|---|---|",
        f"| experts a layer | {before.n_experts} | {after.n_experts} |",
        f"| experts a token gets | {before.top_k} | {after.top_k} |",
        f"| bytes | {before.bytes} | {after.bytes} |",
        f"| parameters | {before.n_parameters} | {after.n_parameters} |",
        f"| parameters a token passes | {before.n_active} | {after.n_active} |",
    ]
    return "\n".join(lines) + "\n"
