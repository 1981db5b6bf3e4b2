"""HC-SMoE: hierarchical clustering of what experts say on average."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mediator_cli.moe.compress.groups import Group, make_groups

if TYPE_CHECKING:
    from mediator_cli.kernels.arrays import Doubles
    from mediator_cli.moe.compress.statistics import LayerStatistics


def hc_smoe(found: LayerStatistics, n: int) -> tuple[Group, ...]:
    """Cluster experts by o_j = mean of E_j(x) over all tokens, not only those that they get; n clusters a layer.

    Average linkage on Euclidean distances; W = Σ f_i W_i / Σ f_i with the usage frequency f.
    HC-SMoE, arXiv 2410.08589. There the router keeps all its rows, and the gates of a cluster's members add up; stock
    formats have one row an expert, so that is what `router: tied` does, and the other rules keep one row a cluster.
    """
    return make_groups(average_linkage(found.mean_output, n), found.frequency)


def average_linkage(points: Doubles, n: int) -> list[list[int]]:
    """Join the two clusters of least mean distance until n are left; points [m, dims].

    >>> import numpy as np
    >>> average_linkage(np.array([[0.0], [5.0], [1.0]]), 2)
    [[1], [0, 2]]
    """
    from scipy.cluster.hierarchy import linkage

    if len(points) == 1:
        return [[0]]
    clusters = {at: [at] for at in range(len(points))}
    steps = linkage(points, method="average", metric="euclidean")
    for at, (left, right, *_) in enumerate(steps[: len(points) - n]):
        clusters[len(points) + at] = sorted(clusters.pop(int(left)) + clusters.pop(int(right)))
    return list(clusters.values())
