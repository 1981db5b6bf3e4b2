"""How alike the experts of a plan are, and which of them to merge: a report."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from mediator_cli.checkpoint.layout import unit_of
from mediator_cli.engine.kinship import kinship_passes, sum_tensors
from mediator_cli.engine.sweep import carry_out
from mediator_cli.errors import OutputError, Problem
from mediator_cli.pipeline.align import open_aligned
from mediator_cli.pipeline.download import download_weights
from mediator_cli.pipeline.lineage import tell_doubts
from mediator_cli.pipeline.progress import counter
from mediator_cli.pipeline.settings import budget_of, row_bytes
from mediator_cli.stages.kinship import Metric, cluster, complementary, measure_kinship, without_sign

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
    """The kinship of two experts; null where a delta is zero, and of pcc where it is constant."""

    experts: tuple[str, str]
    pcc: float | None
    cosine: float | None
    euclidean: float | None


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
    on, each with one more who is least kin to those before. In all of these the metric `euclidean` is a distance.
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


def measure_experts(plan: Plan, run: Settings, form: KinshipForm | None = None) -> KinshipReport:
    """Measure the kinship of the experts of a plan by streaming them once, with `int8` twice.

    Raises OutputError where there are no two experts, CheckpointError where a weight is not finite.
    """
    form = form or KinshipForm()
    _check_pair(plan)
    download_weights(plan, run.progress)
    sizes = {tensor.name: tensor.size for tensor in plan.tensors if tensor.average is not None and tensor.size}
    budget = budget_of(plan, run)
    with open_aligned(plan, run) as streams:
        doubts = tell_doubts(plan, streams, run.notify)
        total = kinship_passes(int8=form.int8) * sum(sizes.values()) * row_bytes(plan)
        advance = counter(run.progress, "kinship", total, row_bytes(plan))
        search = sum_tensors(streams, sizes, budget.slab, int8=form.int8, split=form.split)
        sums = carry_out(search, budget.workers, advance)
    return make_kinship_report(plan, sums, form, doubts)


def _check_pair(plan: Plan) -> None:
    if len(plan.experts) < 2:
        place = plan.loaded.place("experts")
        raise OutputError(Problem(place, "kinship is of at least two experts", "add an expert"))
    if all(tensor.average is None or not tensor.size for tensor in plan.tensors):
        place = plan.loaded.place("keep_base")
        raise OutputError(Problem(place, "every tensor is the base's: nothing is left to compare", "keep fewer"))


def make_kinship_report(
    plan: Plan, sums: Mapping[str, PairSums], form: KinshipForm, notices: Sequence[str] = ()
) -> KinshipReport:
    """Put the sums of all tensors in order: pairs, units, clusters, proposals."""
    names = tuple(expert.name for expert in plan.experts)
    members: dict[str, list[PairSums]] = {}
    for name, part in sums.items():
        members.setdefault(unit_of(name, plan.loaded.recipe.conflict.unit), []).append(part)
    whole = _measured(list(sums.values()), form)
    kin = whole.by(form.metric)
    sign = -1.0 if form.metric == "euclidean" else 1.0
    branches = cluster(kin)
    return KinshipReport(
        experts=names,
        metric=form.metric,
        int8=form.int8,
        split=form.split,
        unsigned=form.unsigned,
        unit=plan.loaded.recipe.conflict.unit,
        n_entries=sum(part.size for part in sums.values()),
        pairs=_pairs(names, whole),
        units={unit: _pairs(names, _measured(members[unit], form)) for unit in plan.units if unit in members},
        order=tuple(names[at] for at in (*branches[-1].left, *branches[-1].right)),
        tree=tuple(_branch(names, branch, sign) for branch in branches),
        groups=tuple(_groups(names, complementary(kin), sign)),
        notices=(*notices, *_undefined(names, whole)),
    )


def _measured(parts: Sequence[PairSums], form: KinshipForm) -> Kinship:
    found = measure_kinship(parts, split=form.split)
    return without_sign(found) if form.unsigned else found


def _named(names: Sequence[str], members: Sequence[int]) -> tuple[str, ...]:
    return tuple(names[at] for at in members)


def _pairs(names: Sequence[str], kinship: Kinship) -> tuple[PairKinship, ...]:
    def value(table: Doubles, i: int, j: int) -> float | None:
        return None if np.isnan(table[i, j]) else float(table[i, j])

    return tuple(
        PairKinship(
            experts=(names[i], names[j]),
            pcc=value(kinship.pcc, i, j),
            cosine=value(kinship.cosine, i, j),
            euclidean=value(kinship.euclidean, i, j),
        )
        for i, j in combinations(range(len(names)), 2)
    )


def _branch(names: Sequence[str], branch: Branch, sign: float) -> BranchReport:
    left, right = _named(names, branch.left), _named(names, branch.right)
    return BranchReport(left=left, right=right, kinship=sign * branch.kinship)


def _groups(names: Sequence[str], chosen: Sequence[tuple[int, float]], sign: float) -> Iterator[GroupReport]:
    for count in range(2, len(chosen) + 1):
        members = _named(names, [at for at, _ in chosen[:count]])
        yield GroupReport(experts=members, kinship=sign * chosen[count - 1][1])


def _undefined(names: Sequence[str], kinship: Kinship) -> Iterator[str]:
    """Say whose kinship is undefined, and why."""
    for at, name in enumerate(names):
        if math.isnan(kinship.cosine[at, at]):
            yield f"expert {name} equals the base: its delta is zero, so its PCC and cosine are undefined"
        elif math.isnan(kinship.pcc[at, at]):
            yield f"every entry of expert {name}'s delta is the same, so its PCC is undefined"
