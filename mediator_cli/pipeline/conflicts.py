"""Measure conflict by streaming all experts once or more; reuse a report that belongs to the same sources."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from mediator_cli.bundle.conflict_report import ConflictReport, ConflictSample, TensorConflict
from mediator_cli.bundle.manifest import UnitScores, read_record
from mediator_cli.checkpoint.layout import layers_of, place_of, unit_of
from mediator_cli.errors import BundleError, OutputError, Problem
from mediator_cli.pipeline.align import align_words
from mediator_cli.pipeline.assign import assign_plan
from mediator_cli.pipeline.sources import changed_sources
from mediator_cli.stages.assign import score_limit
from mediator_cli.stages.conflict import (
    ConflictCounts,
    ConflictScores,
    score_counts,
    unpack_counts,
)
from mediator_cli.stages.sample import ScoreBounds, score_sample

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from mediator_cli.bundle.record import SourceFile
    from mediator_cli.kernels.arrays import Doubles
    from mediator_cli.plan.model import Plan
    from mediator_cli.recipe.schema import DenoiseSpec, Measure
    from mediator_cli.stages.assign import Decision
    from mediator_cli.stages.sample import BlockSample


def denoise_name(denoise: DenoiseSpec) -> str:
    """Name the denoising in words, the same for the same setting."""
    if denoise.keep_above_std is not None:
        return f"keep_above_std {float(denoise.keep_above_std)}"
    return "none" if denoise.top_fraction is None else f"top_fraction {float(denoise.top_fraction)}"


def conflict_passes(denoise: DenoiseSpec) -> int:
    """Count how often all sources are read to measure conflict."""
    return {"none": 1, "keep_above_std": 2, "top_fraction": 3}[denoise_name(denoise).split()[0]]


def check_pair(plan: Plan) -> None:
    """Raise OutputError where there are no two experts to compare, or their layers are stacked."""
    if plan.inputs:
        message = "stacked layers are no fine-tunes of one base, so there is no conflict to measure"
        raise OutputError(Problem(plan.loaded.place("slices"), message, "leave `slices` out"))
    if len(plan.experts) < 2:
        place = plan.loaded.place("experts")
        raise OutputError(Problem(place, "conflict needs at least two experts", "add an expert"))


def make_report(
    plan: Plan, counts: Mapping[str, Doubles], sources: Mapping[str, tuple[SourceFile, ...]]
) -> ConflictReport:
    """Score every unit from the counts of all float tensors."""
    n = len(plan.experts)
    sizes = {tensor.name: tensor.size for tensor in plan.tensors}
    records = {
        name: TensorConflict(size=sizes[name], **asdict(unpack_counts(vector, n))) for name, vector in counts.items()
    }
    return _report(plan, denoise_name(plan.loaded.recipe.conflict.denoise), records, sources)


def make_sampled_report(
    plan: Plan, samples: Mapping[str, BlockSample], share: float, sources: Mapping[str, tuple[SourceFile, ...]]
) -> ConflictReport:
    """Estimate the score of every unit from a sample of blocks, with 95 % bounds; an empty tensor has none."""
    n = len(plan.experts)
    nothing = np.zeros(3 * n * n + n + 2)
    merged = [tensor.name for tensor in plan.tensors if tensor.average is not None]
    totals = {name: samples[name].total if name in samples else nothing for name in merged}
    report = make_report(plan, totals, sources)
    members: dict[str, list[BlockSample]] = {unit: [] for unit in report.units}
    for name, sample in samples.items():
        members[unit_of(name, plan.loaded.recipe.conflict.unit)].append(sample)
    scored = {unit: score_sample(each, n) for unit, each in members.items()}
    bounds = {unit: UnitScores(**asdict(bound)) for unit, (_, bound) in scored.items()}
    units = {unit: UnitScores(**asdict(scores)) for unit, (scores, _) in scored.items()}
    return report.model_copy(update={"units": units, "sample": ConflictSample(share=share, bounds=bounds)})


def _report(
    plan: Plan, denoise: str, tensors: dict[str, TensorConflict], sources: Mapping[str, tuple[SourceFile, ...]]
) -> ConflictReport:
    granularity = plan.loaded.recipe.conflict.unit
    members: dict[str, list[ConflictCounts]] = {unit: [] for unit in plan.units}
    for name, record in tensors.items():
        members[unit_of(name, granularity)].append(_counts(record))
    units = {unit: UnitScores(**asdict(score_counts(counts))) for unit, counts in members.items() if counts}
    return ConflictReport(
        schema_version=2,
        experts=tuple(expert.name for expert in plan.experts),
        sources=dict(sources),
        denoise=denoise,
        align=align_words(plan),
        unit=granularity,
        units=units,
        tensors=tensors,
    )


def scores_by_measure(plan: Plan, report: ConflictReport) -> dict[str, float]:
    """Return each unit's score by the recipe's measure; 0 for a unit without entries."""
    measure = plan.loaded.recipe.conflict.measure
    scores = {unit: ConflictScores(**record.model_dump()).by(measure) for unit, record in report.units.items()}
    return {unit: scores.get(unit, 0.0) for unit in plan.units}


def reuse_report(plan: Plan, file: Path, sources: Mapping[str, tuple[SourceFile, ...]]) -> ConflictReport:
    """Read a conflict report for this plan; its unit may differ, its experts, sources and denoising may not."""
    report = read_record(file, ConflictReport, "conflict report")
    wanted = denoise_name(plan.loaded.recipe.conflict.denoise)
    hint = "measure again with `mediator analyze-conflicts`"
    problems = []
    if report.sample is not None:
        message = f"is an estimate from {report.sample.share:.2g} of the weights"
        problems.append(Problem(str(file), message, "measure all with `mediator analyze-conflicts` without --sample"))
    if report.experts != tuple(expert.name for expert in plan.experts):
        problems.append(Problem(str(file), f"is about experts {', '.join(report.experts)}", hint))
    if report.denoise != wanted:
        problems.append(Problem(str(file), f"was denoised by {report.denoise}, the recipe says {wanted}", hint))
    if report.align != align_words(plan):
        message = f"was measured with align: {report.align}, the recipe says {align_words(plan)}"
        problems.append(Problem(str(file), message, hint))
    if set(report.tensors) != {tensor.name for tensor in plan.tensors if tensor.average is not None and tensor.size}:
        problems.append(Problem(str(file), "is about other tensors", hint))
    for name in changed_sources(sources, report.sources):
        problems.append(Problem(str(file), f"was measured on other weights of {name}", hint))
    if problems:
        raise BundleError(problems)
    return _report(plan, wanted, report.tensors, sources)


@dataclass(frozen=True)
class HeatTable:
    """Conflict by row (layer, or tensor outside the layers) and column (module kind); None where there is none."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class Preview:
    """A heat map with the score and the assignment of each row; empty where a row is cut into several units.

    `units` has, by row, score and decision of every unit in it; `limit` is the score above which one is routed.
    `bounds` has, for an estimate, how far the score of a row may be off.
    """

    measure: str
    table: HeatTable
    scores: tuple[float | None, ...]
    all_scores: tuple[UnitScores | None, ...]
    decisions: tuple[str, ...]
    units: tuple[tuple[tuple[str, float, Decision], ...], ...]
    limit: float | None
    bounds: tuple[float | None, ...] = ()


def heat_table(report: ConflictReport, measure: Measure) -> HeatTable:
    """Lay the conflict of all tensors out by layer and module kind."""
    cells: dict[str, dict[str, list[ConflictCounts]]] = {}
    for name, record in report.tensors.items():
        place = place_of(name)
        row = cells.setdefault(place.layer or unit_of(name, "layer"), {})
        if place.layer is not None:
            row.setdefault(place.kind, []).append(_counts(record))
    layers = layers_of(report.tensors)
    outside = [row for row in cells if row not in layers]
    rows = (*layers, *outside)
    columns = tuple(dict.fromkeys(column for row in rows for column in cells[row]))
    values = tuple(
        tuple(score_counts(cells[row][column]).by(measure) if column in cells[row] else None for column in columns)
        for row in rows
    )
    return HeatTable(rows, columns, values)


def preview_assignment(plan: Plan, report: ConflictReport) -> Preview:
    """Lay a report out with the assignment that the recipe's rule gives it."""
    measure = plan.loaded.recipe.conflict.measure
    table = heat_table(report, measure)
    scores = scores_by_measure(plan, report)
    decided = assign_plan(plan, scores)
    decisions, units = [], []
    for row in table.rows:
        inside = [unit for unit in plan.units if unit == row or unit.startswith(f"{row}.")]
        routed = sum(decided[unit] == "route" for unit in inside)
        whole = "route" if routed else "average"
        decisions.append(whole if len(inside) == 1 else f"route {routed} of {len(inside)} units")
        units.append(tuple((unit, scores[unit], decided[unit]) for unit in inside))
    every = tuple(report.units.get(row) for row in table.rows)
    shown = tuple(scores.get(row) for row in table.rows)
    limit = score_limit(plan.loaded.recipe.assign, plan.candidates, scores)
    return Preview(
        measure, table, shown, every, tuple(decisions), tuple(units), limit, _bounds(report, table.rows, measure)
    )


def _bounds(report: ConflictReport, rows: tuple[str, ...], measure: Measure) -> tuple[float | None, ...]:
    """Give the bound on the score of each row that is a unit; nothing where the report is exact."""
    if report.sample is None:
        return ()
    found = {unit: ScoreBounds(**record.model_dump()).by(measure) for unit, record in report.sample.bounds.items()}
    return tuple(found.get(row) for row in rows)


def _counts(record: TensorConflict) -> ConflictCounts:
    return ConflictCounts(**record.model_dump(exclude={"size"}))
