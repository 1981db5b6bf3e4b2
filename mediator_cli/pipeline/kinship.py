"""How alike the experts of a plan are, and which of them to merge: a report."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from mediator_cli.checkpoint.layout import unit_of
from mediator_cli.engine.kinship import kinship_passes, sum_tensors
from mediator_cli.engine.sweep import carry_out
from mediator_cli.errors import CheckpointError, OutputError, Problem
from mediator_cli.pipeline.adapter_kinship import sum_factors, what_is_no_factor
from mediator_cli.pipeline.align import open_aligned
from mediator_cli.pipeline.download import download_weights
from mediator_cli.pipeline.lineage import tell_doubts
from mediator_cli.pipeline.progress import counter
from mediator_cli.pipeline.settings import budget_of, row_bytes
from mediator_cli.stages.adapter_kinship import Overlap, mean_overlap
from mediator_cli.stages.kinship import (
    DISTANCES,
    METRICS,
    Metric,
    cluster,
    complementary,
    measure_kinship,
    same_deltas,
    without_sign,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mediator_cli.kernels.arrays import Doubles
    from mediator_cli.pipeline.settings import Settings
    from mediator_cli.plan.model import Plan
    from mediator_cli.stages.kinship import Branch, Kinship, PairSums


@dataclass(frozen=True)
class KinshipForm:
    """How kinship is measured: `metric` orders experts; the others are the forms of the authors' code.

    `int8`: deltas are rounded to 8 bits first. `split`: each tensor by itself, and the mean by size. `unsigned`: the
    cosine without its sign.
    """

    metric: Metric = "pcc"
    int8: bool = False
    split: bool = False
    unsigned: bool = False


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PairKinship(_Record):
    """The kinship of two experts; null where a delta is zero, and of pcc where it is constant.

    `overlap` is the mean of `overlap_out` and `overlap_in`, of adapters only: the share of directions of outputs and
    inputs that they have in common, averaged over matrices. `output` is the Jensen-Shannon divergence of their answers
    in nats, where rows were given, over the whole model only.
    """

    experts: tuple[str, str]
    pcc: float | None
    cosine: float | None
    euclidean: float | None
    overlap: float | None = None
    overlap_out: float | None = None
    overlap_in: float | None = None
    output: float | None = None


class BranchReport(_Record):
    """Two clusters of experts that become one; `kinship` is the mean of the metric over the pairs between them."""

    left: tuple[str, ...]
    right: tuple[str, ...]
    kinship: float


class GroupReport(_Record):
    """Experts of low kinship, and the mean of the metric over all their pairs."""

    experts: tuple[str, ...]
    kinship: float


class KinshipReport(_Record):
    """Kinship of all pairs of experts over the whole model and by unit; `order` puts near relatives side by side.

    `tree` joins clusters from the nearest kin on. `groups` are proposals what to merge: of two experts, of three and so
    on, each with one more who is least kin to those before. In all of these the metrics `euclidean` and `output` are
    distances. `low_rank`: adapters were compared by their factors. `same` are experts of one delta. `n_positions`: of
    how many tokens answers were compared.
    """

    schema_version: Literal[1] = 1
    experts: tuple[str, ...]
    metric: Metric
    int8: bool
    split: bool
    unsigned: bool
    unit: str
    n_entries: int
    pairs: tuple[PairKinship, ...]
    units: dict[str, tuple[PairKinship, ...]]
    order: tuple[str, ...]
    tree: tuple[BranchReport, ...]
    groups: tuple[GroupReport, ...]
    notices: tuple[str, ...]
    low_rank: bool = False
    same: tuple[tuple[str, ...], ...] = ()
    n_positions: int = 0


@dataclass(frozen=True)
class Answers:
    """How far the experts' answers are apart: distances [n, n], over so many positions."""

    distances: Doubles
    n_positions: int


@dataclass(frozen=True)
class Measured:
    """What was measured of the deltas: sums over pairs, and of adapters the overlap, by tensor."""

    sums: Mapping[str, PairSums]
    overlaps: Mapping[str, Overlap] | None = None
    notices: tuple[str, ...] = ()


def measure_experts(
    plan: Plan, run: Settings, form: KinshipForm | None = None, answers: Answers | None = None
) -> KinshipReport:
    """Measure the kinship of the experts of a plan: of plain LoRA adapters from their factors, without the base.

    All others are streamed once, with `int8` twice. `answers` are for the metric `output`, and told with the others.

    Raises OutputError where there are no two experts, CheckpointError where a weight is not finite, and where overlap
    is asked of what has no factors.
    """
    form = form or KinshipForm()
    check_pair(plan)
    sizes = {tensor.name: tensor.size for tensor in plan.tensors if tensor.average is not None and tensor.size}
    reasons = _reasons(plan, form)
    if form.metric == "overlap" and reasons:
        raise CheckpointError(reasons)
    measured = _by_streams(plan, sizes, run, form) if reasons else _by_factors(plan, sizes, run)
    return make_kinship_report(plan, measured, form, answers)


def _reasons(plan: Plan, form: KinshipForm) -> list[Problem]:
    """Say why the experts are compared as a whole; nothing where their factors do."""
    whole = [Problem("--int8", "rounds every entry of a delta", "leave it out")] if form.int8 else []
    return [*whole, *what_is_no_factor(plan)]


def _by_factors(plan: Plan, sizes: Mapping[str, int], run: Settings) -> Measured:
    found = sum_factors(plan, sizes, run)
    return Measured(found.sums, found.overlaps)


def _by_streams(plan: Plan, sizes: Mapping[str, int], run: Settings, form: KinshipForm) -> Measured:
    download_weights(plan, run.progress)
    budget = budget_of(plan, run)
    with open_aligned(plan, run) as streams:
        doubts = tell_doubts(plan, streams, run.notify)
        total = kinship_passes(int8=form.int8) * sum(sizes.values()) * row_bytes(plan)
        advance = counter(run.progress, "kinship", total, row_bytes(plan))
        search = sum_tensors(streams, sizes, budget.slab, int8=form.int8, split=form.split)
        sums = carry_out(search, budget.workers, advance)
    return Measured(sums, notices=doubts)


def check_pair(plan: Plan) -> None:
    """Raise OutputError where there is nothing to compare."""
    if len(plan.experts) < 2:
        place = plan.loaded.place("experts")
        raise OutputError(Problem(place, "kinship is of at least two experts", "add an expert"))
    if all(tensor.average is None or not tensor.size for tensor in plan.tensors):
        place = plan.loaded.place("keep_base")
        raise OutputError(Problem(place, "every tensor is the base's: nothing is left to compare", "keep fewer"))


def make_kinship_report(
    plan: Plan, measured: Measured, form: KinshipForm, answers: Answers | None = None
) -> KinshipReport:
    """Put what was measured of all tensors in order: pairs, units, clusters, proposals."""
    names = tuple(expert.name for expert in plan.experts)
    unit = plan.loaded.recipe.conflict.unit
    members: dict[str, list[str]] = {}
    for name in measured.sums:
        members.setdefault(unit_of(name, unit), []).append(name)
    tables = _tables(measured, list(measured.sums), form)
    output = None if answers is None else answers.distances
    whole = replace(tables, kinship=replace(tables.kinship, output=output))
    kin = whole.kinship.by(form.metric)
    branches = cluster(kin)
    same = tuple(_named(names, group) for group in same_deltas(whole.kinship))
    sign = -1.0 if form.metric in DISTANCES else 1.0
    return KinshipReport(
        experts=names,
        metric=form.metric,
        int8=form.int8,
        split=form.split,
        unsigned=form.unsigned,
        unit=unit,
        n_entries=sum(part.size for part in measured.sums.values()),
        pairs=_pairs(names, whole),
        units={unit: _pairs(names, _tables(measured, members[unit], form)) for unit in plan.units if unit in members},
        order=tuple(names[at] for at in (*branches[-1].left, *branches[-1].right)),
        tree=tuple(_branch(names, branch, sign) for branch in branches),
        groups=tuple(_groups(names, complementary(kin), sign)),
        notices=(*measured.notices, *_undefined(names, whole.kinship), *_same(plan, same)),
        low_rank=measured.overlaps is not None,
        same=same,
        n_positions=answers.n_positions if answers is not None else 0,
    )


@dataclass(frozen=True)
class _Tables:
    """All tables [n, n] over some tensors."""

    kinship: Kinship
    overlap: Overlap | None = None


def _tables(measured: Measured, tensors: Sequence[str], form: KinshipForm) -> _Tables:
    parts = [measured.sums[name] for name in tensors]
    found = measure_kinship(parts, split=form.split)
    found = without_sign(found) if form.unsigned else found
    if measured.overlaps is None:
        return _Tables(found)
    overlaps = [measured.overlaps[name] for name in tensors if name in measured.overlaps]
    # Adapters that change no matrix in common have no direction in common; one that changes none has no directions.
    both_change = ~np.isnan(found.cosine)
    mean = mean_overlap(overlaps, len(parts[0].first))
    tables = [np.where(both_change & np.isnan(table), 0.0, table) for table in (mean.outputs, mean.inputs)]
    overlap = Overlap(*tables)
    return _Tables(replace(found, overlap=(overlap.outputs + overlap.inputs) / 2), overlap)


def _same(plan: Plan, groups: Sequence[Sequence[str]]) -> Iterator[str]:
    """Say which experts have one delta."""
    kinds = {expert.name: expert.kind for expert in plan.experts}
    for names in groups:
        what = "adapter" if all(kinds[name] == "lora" for name in names) else "model"
        yield f"{', '.join(names[:-1])} and {names[-1]} are the same {what}"


def _named(names: Sequence[str], members: Sequence[int]) -> tuple[str, ...]:
    return tuple(names[at] for at in members)


def _pairs(names: Sequence[str], tables: _Tables) -> tuple[PairKinship, ...]:
    found: dict[str, Doubles] = {metric: tables.kinship.table(metric) for metric in METRICS}
    if tables.overlap is not None:
        found |= {"overlap_out": tables.overlap.outputs, "overlap_in": tables.overlap.inputs}

    def value(table: Doubles, i: int, j: int) -> float | None:
        return None if np.isnan(table[i, j]) else float(table[i, j])

    return tuple(
        PairKinship(experts=(names[i], names[j]), **{name: value(table, i, j) for name, table in found.items()})
        for i, j in combinations(range(len(names)), 2)
    )


def _branch(names: Sequence[str], branch: Branch, sign: float) -> BranchReport:
    left, right = _named(names, branch.left), _named(names, branch.right)
    return BranchReport(left=left, right=right, kinship=sign * branch.kinship + 0.0)


def _groups(names: Sequence[str], chosen: Sequence[tuple[int, float]], sign: float) -> Iterator[GroupReport]:
    for count in range(2, len(chosen) + 1):
        members = _named(names, [at for at, _ in chosen[:count]])
        yield GroupReport(experts=members, kinship=sign * chosen[count - 1][1] + 0.0)


def _undefined(names: Sequence[str], kinship: Kinship) -> Iterator[str]:
    """Say whose kinship is undefined, and why."""
    for at, name in enumerate(names):
        if math.isnan(kinship.cosine[at, at]):
            yield f"expert {name} equals the base: its delta is zero, so its PCC and cosine are undefined"
        elif math.isnan(kinship.pcc[at, at]):
            yield f"every entry of expert {name}'s delta is the same, so its PCC is undefined"
