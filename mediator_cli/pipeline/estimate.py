"""What a merge will read, write and hold in memory, from the plan alone, and how long it will take on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

from mediator_cli.engine.statistics import group_by_method
from mediator_cli.engine.streams import TABLE_BYTES, peak_bytes
from mediator_cli.methods.statistics import Select
from mediator_cli.pipeline.assign import sparse_sizes
from mediator_cli.pipeline.cost import (
    STAGES,
    conflict_share,
    merge_passes,
    passed_over,
    source_bytes,
    survey_passes,
)
from mediator_cli.pipeline.download import far_files_of, free_bytes
from mediator_cli.pipeline.forecast import Amounts, extracted_bytes, forecast, traffic_of
from mediator_cli.pipeline.moe_report import MoeReport
from mediator_cli.pipeline.record import method_records
from mediator_cli.pipeline.settings import Settings, budget_of, dense_bytes, output_folder
from mediator_cli.recipe.sizes import parse_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from mediator_cli.pipeline.cost import Stage
    from mediator_cli.pipeline.forecast import Cache, Constants, Forecast, Traffic
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


Range = tuple[float, float]
"""From the least to the most that the rule can route."""


class StageReport(BaseModel):
    """Bytes that a stage reads, all passes together, and writes; seconds with the sources in memory, or on the disk."""

    read_bytes: tuple[int, int]
    written_bytes: tuple[int, int]
    warm: Range | None = None
    cold: Range | None = None


class PlanReport(BaseModel):
    """The plan in numbers; sizes in bytes, pairs from the least to the most that the rule can route.

    `seconds` are those of all stages for sources that are in memory (warm) or not (cold), as `sources_are` tells; None
    where nothing was measured. Downloads come on top.
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
    stages: dict[str, StageReport]
    seconds: Range | None = None
    sources_are: Literal["warm", "cold"] | None = None
    dense_bytes: int
    sparse_bytes: tuple[int, int]
    peak_memory: int
    workers: int
    free_disk: int
    methods: tuple[MethodReport, ...]
    weights: dict[str, tuple[float, float]]
    differences: tuple[DifferenceReport, ...]
    notices: tuple[str, ...]
    moe: MoeReport | None = None


def describe_plan(
    plan: Plan,
    output: Path | None,
    settings: Settings,
    constants: Constants | None = None,
    cache: Cache | None = None,
    moe: MoeReport | None = None,
) -> PlanReport:
    """Put a plan in numbers; reads nothing but free disk space. Seconds are foretold from `constants`.

    Of an MoE, `plan` is the widest that the rule can choose; how its layers are chosen and its gates made takes
    time that is not foretold.
    """
    amounts = amounts_of(plan)
    foretold = None if constants is None else [forecast(plan, settings, constants, some) for some in amounts]
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
        read_bytes=_reads(plan, amounts[1]) | ({"measure conflict": moe.conflict_bytes} if moe else {}),
        stages=_stages([traffic_of(plan, some) for some in amounts], foretold),
        seconds=_ends(each.seconds(cache or "warm") for each in foretold) if foretold else None,
        sources_are=(cache or "warm") if foretold else None,
        dense_bytes=dense_bytes(plan),
        sparse_bytes=_sparse_range(plan),
        peak_memory=peak_bytes(plan.n_rows, budget) - TABLE_BYTES + _table_bytes(plan),
        workers=budget.workers,
        free_disk=free_bytes(target),
        methods=tuple(MethodReport(**record.model_dump()) for record in method_records(plan)),
        weights=_weights(plan),
        differences=tuple(
            DifferenceReport(setting=d.setting, winner=d.winner, value=d.value, others=dict(d.others))
            for d in plan.differences
        ),
        notices=plan.notices,
        moe=moe,
    )


def _table_bytes(plan: Plan) -> int:
    """Estimate what the searches for thresholds hold: much where many tensors are ranked by themselves at a time."""
    recipe = plan.loaded.recipe
    overs = {
        statistic.over(group.method.params)
        for group in group_by_method(plan.tensors)
        for statistic in group.method.needed_statistics()
        if isinstance(statistic, Select)
    }
    if recipe.assign.rule != "none":
        overs |= {t.extract.over for t in plan.tensors if t.extract.select == "magnitude" and t.extract.density < 1}
        overs |= {"tensor"} if recipe.conflict.denoise.top_fraction is not None else set()
    if "tensor" in overs:
        return TABLE_BYTES
    return TABLE_BYTES // 5 if overs else 0


def _weights(plan: Plan) -> dict[str, tuple[float, float]]:
    """Give the least and the most of each expert's weights; none for stacked layers, whose slices have their own."""
    if plan.inputs:
        return {}
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


def _reads(plan: Plan, most: Amounts) -> dict[str, int]:
    """Count bytes by what they are read for; passes that serve two ends count for the first."""
    once, counted = sum(source_bytes(plan).values()), conflict_share(plan)
    ranked = survey_passes(plan) - counted + merge_passes(plan) - 1
    return {
        "measure conflict": round(counted * once),
        "rank deltas": round(ranked * once),
        "average": once,
        "extract experts": round(extracted_bytes(plan, most)),
        "digest sources": passed_over(plan),
    }


def _stages(traffic: Sequence[Mapping[Stage, Traffic]], foretold: Sequence[Forecast] | None) -> dict[str, StageReport]:
    found: dict[str, StageReport] = {}
    for stage in STAGES:
        read, written = _ends(each[stage].read for each in traffic), _ends(each[stage].written for each in traffic)
        report = StageReport(read_bytes=_whole(read), written_bytes=_whole(written))
        if foretold is not None:
            warm, cold = _ends(each.warm[stage] for each in foretold), _ends(each.cold[stage] for each in foretold)
            report = report.model_copy(update={"warm": warm, "cold": cold})
        found[stage] = report
    return found


def _ends(values: Iterable[float]) -> Range:
    low, high = values
    return low, high


def _whole(ends: Range) -> tuple[int, int]:
    return round(ends[0]), round(ends[1])


def amounts_of(plan: Plan) -> tuple[Amounts, Amounts]:
    """Bound what the rule can route."""
    shares, sizes = _routed_share(plan), sum(tensor.size for tensor in plan.tensors)
    low, high = (Amounts(share * sizes, n_bytes) for share, n_bytes in zip(shares, _sparse_range(plan), strict=True))
    return low, high


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
