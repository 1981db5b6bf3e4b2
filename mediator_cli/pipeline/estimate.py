"""What a merge will read, write and hold in memory, from the plan alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from mediator_cli.engine.statistics import group_by_method
from mediator_cli.engine.streams import peak_bytes
from mediator_cli.pipeline.assign import sparse_sizes
from mediator_cli.pipeline.conflicts import conflict_passes
from mediator_cli.pipeline.download import far_files_of, free_bytes
from mediator_cli.pipeline.merge import Settings, budget_of, dense_bytes, output_folder, resident_bytes
from mediator_cli.pipeline.record import method_records
from mediator_cli.recipe.sizes import parse_size

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from mediator_cli.plan.model import Plan


class DifferenceReport(BaseModel):
    """A setting in which the sources differ, and whose value wins."""

    setting: str
    winner: str
    value: Any
    others: dict[str, Any]


class MethodReport(BaseModel):
    """A merge method, its parameters after defaults, and the tensors it merges."""

    method: str
    parameters: dict[str, Any]
    n_tensors: int


class PlanReport(BaseModel):
    """The plan in numbers; sizes in bytes, `sparse_bytes` from the least to the most that the rule can route.

    `download_bytes` is by source, and empty where all weights are on disk. `weights` are the least and the most merge
    weight of each expert over the tensors that are merged.
    """

    model_config = ConfigDict(frozen=True)

    output: str
    n_layers: int
    n_units: int
    n_tensors: int
    assignment: str
    settings_from: dict[str, str]
    download_bytes: dict[str, int]
    read_bytes: dict[str, int]
    dense_bytes: int
    sparse_bytes: tuple[int, int]
    peak_memory: int
    workers: int
    free_disk: int
    methods: tuple[MethodReport, ...]
    weights: dict[str, tuple[float, float]]
    differences: tuple[DifferenceReport, ...]
    notices: tuple[str, ...]


def describe_plan(plan: Plan, output: Path | None, settings: Settings) -> PlanReport:
    """Put a plan in numbers; reads nothing but free disk space."""
    budget = budget_of(plan, settings)
    target = output_folder(plan, output)
    return PlanReport(
        output=str(target),
        n_layers=len(plan.layers),
        n_units=len(plan.units),
        n_tensors=len(plan.tensors),
        assignment=_assignment(plan),
        settings_from=_winners(plan),
        download_bytes={name: sum(file.n_bytes for file in files) for name, files in far_files_of(plan).items()},
        read_bytes=_reads(plan),
        dense_bytes=dense_bytes(plan),
        sparse_bytes=_sparse_range(plan),
        peak_memory=peak_bytes(len(plan.experts), budget, resident_bytes(plan)),
        workers=budget.workers,
        free_disk=free_bytes(target),
        methods=tuple(MethodReport(**record.model_dump()) for record in method_records(plan)),
        weights=_weights(plan),
        differences=tuple(
            DifferenceReport(setting=d.setting, winner=d.winner, value=d.value, others=dict(d.others))
            for d in plan.differences
        ),
        notices=plan.notices,
    )


def _weights(plan: Plan) -> dict[str, tuple[float, float]]:
    columns = zip(*(tensor.weights for tensor in plan.tensors if tensor.average is not None), strict=True)
    return {expert.name: (min(column), max(column)) for expert, column in zip(plan.experts, columns, strict=False)}


def _winners(plan: Plan) -> dict[str, str]:
    """Say whose settings the bundle gets, whether the sources differ in them or not."""
    name = plan.loaded.recipe.tokenizer_of
    lora = {expert.name for expert in plan.experts if expert.kind == "lora"}
    # An adapter's folder may bring a tokenizer, but neither config nor generation config.
    other = "base" if name in lora else name
    return {
        "config, rope": "base",
        "tokenizer, chat template": name,
        "generation config, eos and other token ids": other,
    }


def _assignment(plan: Plan) -> str:
    spec = plan.loaded.recipe.assign
    every = f"route {len(plan.candidates)} of {len(plan.units)} units: all candidates"
    fixed = {"none": "average all units", "all": every, "listed": f"route {', '.join(plan.listed)}"}
    if spec.rule in fixed:
        return fixed[spec.rule]
    rule = {
        "threshold": f"score > {spec.threshold}",
        "top_k": f"the {spec.k} highest scores",
        "mean_std": f"score > mean + {spec.std or 0.0} std",
        "byte_budget": f"by score while the sparse experts fit in {spec.bytes}",
    }[spec.rule]
    return f"route of {len(plan.candidates)} candidates: {rule} ({plan.loaded.recipe.conflict.measure})"


def _reads(plan: Plan) -> dict[str, int]:
    per_pass = sum(info.n_bytes for info in plan.base.tensors.values())
    per_pass += sum(info.n_bytes for expert in plan.experts for info in expert.tensors.values())
    rule = plan.loaded.recipe.assign.rule
    sizes = sum(tensor.size for tensor in plan.tensors)
    ranked = sum(group.n_read for group in group_by_method(plan.tensors)) / max(1, sizes)
    measured = 0 if rule == "none" else conflict_passes(plan.loaded.recipe.conflict.denoise)
    extract = plan.loaded.recipe.extract
    passes = (3 if extract.values in ("sign", "int8") else 2) + (extract.over == "model")
    routed = _routed_share(plan)[1] * passes
    return {
        "digest sources": per_pass,
        "measure conflict": measured * per_pass,
        "rank deltas": int(ranked * per_pass),
        "average": per_pass,
        "extract experts": int(routed * per_pass),
    }


def _routed_share(plan: Plan) -> tuple[float, float]:
    """Bound the share of all entries that can be routed."""
    sizes = dict.fromkeys(plan.units, 0)
    for tensor in plan.tensors:
        sizes[tensor.unit] += tensor.size if tensor.can_be_routed else 0
    total = max(1, sum(tensor.size for tensor in plan.tensors))
    low, high = _routed_range(plan, sizes)
    return low / total, high / total


def _routed_range(plan: Plan, amounts: Mapping[str, int]) -> tuple[int, int]:
    """Bound what the routed units come to together, from the amount of each unit."""
    spec = plan.loaded.recipe.assign
    if spec.rule in ("none", "all", "listed"):
        units = {"none": (), "all": plan.candidates, "listed": plan.listed}[spec.rule]
        whole = sum(amounts[unit] for unit in units)
        return whole, whole
    ordered = sorted(amounts[unit] for unit in plan.candidates)
    if spec.rule == "top_k":
        k = min(spec.k or 0, len(ordered))
        return sum(ordered[:k]), sum(ordered[len(ordered) - k :])
    if spec.rule == "byte_budget":
        low, high = _filled(plan)
        return int(low * sum(ordered)), int(high * sum(ordered))
    return 0, sum(ordered)


def _filled(plan: Plan) -> tuple[float, float]:
    """Bound the share of the candidates that a byte budget takes in: what is left over is less than one unit."""
    sizes = sparse_sizes(plan, overrides=True)
    each = [sizes.units[unit] for unit in plan.candidates]
    left = parse_size(plan.loaded.recipe.assign.bytes or 0) - sizes.files
    total = max(1, sum(each))
    if sum(each) <= left:
        return 1.0, 1.0
    return max(0, left - max(each)) / total, max(0, left) / total


def _sparse_range(plan: Plan) -> tuple[int, int]:
    return _routed_range(plan, sparse_sizes(plan).units)
