"""What has to be known of the whole model before its first tensor is merged: conflict, thresholds over the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mediator_cli.bundle.conflict_report import ConflictReport
from mediator_cli.bundle.record import SourceFile
from mediator_cli.checkpoint.digest import Digests
from mediator_cli.checkpoint.header import identity
from mediator_cli.engine.conflict import count_tensors, sample_tensors
from mediator_cli.engine.statistics import find_statistics, group_by_method
from mediator_cli.engine.sweep import all_of, carry_out
from mediator_cli.pipeline.align import open_aligned
from mediator_cli.pipeline.conflicts import check_pair, conflict_passes, make_report, make_sampled_report
from mediator_cli.pipeline.download import download_weights
from mediator_cli.pipeline.lineage import tell_doubts
from mediator_cli.pipeline.progress import counter
from mediator_cli.pipeline.settings import Settings, budget_of, row_bytes
from mediator_cli.pipeline.sources import known_digest, source_files, tensors_by_file

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from mediator_cli.engine.journal import Journal
    from mediator_cli.engine.statistics import Found, Group
    from mediator_cli.engine.streams import Budget, Streams
    from mediator_cli.engine.sweep import Search
    from mediator_cli.kernels.arrays import Doubles
    from mediator_cli.plan.model import Plan, TensorPlan

_STEP = "survey"


@dataclass(frozen=True)
class Survey:
    """The conflict counts of every float tensor, where they are asked for, and statistics over the model."""

    counts: Mapping[str, Any] | None
    found: Found


def take_survey(
    plan: Plan,
    merged: Sequence[TensorPlan],
    streams: Streams,
    run: Settings,
    *,
    conflict: bool,
    journal: Journal | None = None,
) -> Survey:
    """Measure conflict, and find the thresholds over the model of the tensors to be merged, in common passes.

    A journal keeps the result.
    """
    budget = budget_of(plan, run)
    if journal is not None and _STEP in journal.steps:
        return _read(journal.steps[_STEP])
    # Thresholds over the model are over all tensors of a method, routed or not, so that they never depend on routing.
    groups = [group for group in group_by_method(merged) if group.spans_model]
    searches: list[Search[Any]] = [find_statistics(streams, group, budget.slab) for group in groups]
    if conflict:
        searches.append(_conflict(plan, streams, budget))
    if not searches:
        return Survey(None, {})
    total = survey_elements(plan, groups, conflict=conflict)
    advance = counter(run.progress, "survey", total * row_bytes(plan), row_bytes(plan))
    results = carry_out(all_of(searches), budget.workers, advance, run.team)
    counts = results.pop() if conflict else None
    survey = Survey(counts, {name: facts for result in results for name, facts in result.items()})
    if journal is not None:
        journal.write(_STEP, _written(survey))
    return survey


def survey_elements(plan: Plan, groups: list[Group], *, conflict: bool) -> int:
    """Count the elements of each source that are read: passes run side by side where they can."""
    ranked = max((group.passes() * sum(t.size for t in group.tensors) for group in groups), default=0)
    merged = sum(tensor.size for tensor in plan.tensors if tensor.average is not None)
    counted = conflict_passes(plan.loaded.recipe.conflict.denoise) * merged if conflict else 0
    return max(ranked, counted)


def _conflict(plan: Plan, streams: Streams, budget: Budget) -> Search[dict[str, Doubles]]:
    sizes = {tensor.name: tensor.size for tensor in plan.tensors if tensor.average is not None and tensor.size}
    return count_tensors(streams, sizes, plan.loaded.recipe.conflict.denoise, budget.slab)


def _written(survey: Survey) -> dict[str, Any]:
    counts = None if survey.counts is None else {name: vector.tolist() for name, vector in survey.counts.items()}
    found = {
        name: {what: [str(array.dtype), list(array.shape), array.ravel().tolist()] for what, array in facts.items()}
        for name, facts in survey.found.items()
    }
    return {"counts": counts, "found": found}


def _read(facts: Mapping[str, Any]) -> Survey:
    counts = facts["counts"]
    found: Found = {
        name: {what: np.array(values, dtype).reshape(shape) for what, (dtype, shape, values) in each.items()}
        for name, each in facts["found"].items()
    }
    return Survey(None if counts is None else {name: np.array(row) for name, row in counts.items()}, found)


def conflict_report(plan: Plan, survey: Survey, sources: Mapping[str, Any]) -> ConflictReport | None:
    """Score every unit from the counts of a survey."""
    return None if survey.counts is None else make_report(plan, survey.counts, sources)


def analyze_conflicts(plan: Plan, settings: Settings | None = None) -> ConflictReport:
    """Measure how much the experts of a plan disagree, without merging."""
    run, seen = settings or Settings(), Digests()
    check_pair(plan)
    download_weights(plan, run.progress)
    with open_aligned(plan, run, seen) as streams:
        tell_doubts(plan, streams, run.notify)
        survey = take_survey(plan, (), streams, run, conflict=True)
    report = conflict_report(plan, survey, source_files(plan, seen, run))
    if report is None:
        raise RuntimeError("a survey of conflict counts it")
    return report


def sample_conflicts(plan: Plan, share: float, run: Settings) -> ConflictReport:
    """Estimate how much the experts of a plan disagree from a share of the blocks of each tensor, with bounds.

    Sources are named without digests that are not known yet: to take them is to read all.
    """
    check_pair(plan)
    download_weights(plan, run.progress)
    merged = {tensor.name: tensor.size for tensor in plan.tensors if tensor.average is not None}
    denoise = plan.loaded.recipe.conflict.denoise
    total = round(share * conflict_passes(denoise) * sum(merged.values()))
    with open_aligned(plan, run) as streams:
        tell_doubts(plan, streams, run.notify)
        advance = counter(run.progress, "sample", total * row_bytes(plan), row_bytes(plan))
        samples = carry_out(sample_tensors(streams, merged, denoise, share), budget_of(plan, run).workers, advance)
    return make_sampled_report(plan, samples, share, _known_sources(plan))


def _known_sources(plan: Plan) -> dict[str, tuple[SourceFile, ...]]:
    groups = tensors_by_file(plan)
    return {name: tuple(_known(file) for file in files) for name, files in groups.items()}


def _known(file: Path) -> SourceFile:
    return known_digest(file) or SourceFile(name=file.name, bytes=int(identity(file)[0]))
