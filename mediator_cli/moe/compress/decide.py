"""From what was measured to groups: one method for one layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mediator_cli.moe.compress.hc_smoe import hc_smoe
from mediator_cli.moe.compress.m_smoe import m_smoe
from mediator_cli.moe.compress.ream import ream
from mediator_cli.moe.compress.reap import reap
from mediator_cli.moe.compress.sub_moe import sub_moe

if TYPE_CHECKING:
    from mediator_cli.kernels.arrays import Floats
    from mediator_cli.moe.compress.groups import Group
    from mediator_cli.moe.compress.job import Job
    from mediator_cli.moe.compress.statistics import LayerStatistics


def decide(job: Job, found: LayerStatistics) -> tuple[Group, ...]:
    """Group the experts of one layer as the job's method does; experts in no group are dropped."""
    n = job.n_experts
    if job.method == "reap":
        return reap(found, n)
    if job.method == "ream":
        return ream(found, n, job.cap)
    if job.method == "m_smoe":
        return m_smoe(found, n)
    if job.method == "hc_smoe":
        return hc_smoe(found, n)
    return sub_moe(found, n, job.seed)


def slots(job: Job, groups: tuple[Group, ...]) -> list[tuple[int, ...]]:
    """Say for each group which experts it becomes on disk: one in its place, or one for each member where tied."""
    return [group.members if job.router == "tied" else (at,) for at, group in enumerate(groups)]


def new_gates(job: Job, groups: tuple[Group, ...], gates: Floats) -> Floats:
    """Make the gates of the compressed layer from the old ones [experts, hidden]; see `Job.router`."""
    if job.router == "tied":
        return gates
    if job.router == "dominant":
        return gates[[group.centre for group in groups]]
    return np.stack([_mean_row(group, gates) for group in groups])


def _mean_row(group: Group, gates: Floats) -> Floats:
    rows = gates[list(group.members)].astype(np.float64)
    found: Floats = (np.asarray(group.weights) @ rows).astype(np.float32)
    return found
