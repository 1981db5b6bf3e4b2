"""Sub-MoE: experts clustered by their answers, merged in the subspace that they share."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from mediator_cli.moe.compress.groups import Group, make_groups

if TYPE_CHECKING:
    from mediator_cli.kernels.arrays import Doubles
    from mediator_cli.moe.compress.statistics import LayerStatistics


def sub_moe(found: LayerStatistics, n: int, seed: int) -> tuple[Group, ...]:
    """Cluster experts by the mean over all tokens of the cosines of their outputs; k-means++ with n clusters.

    The vector of an expert is its row of the similarities [experts, experts]. The merge is that of the joint SVD
    [W_1 … W_n] = U Σ [V_1ᵀ … V_nᵀ], V_m = Σ f_i V_i / Σ f_i, W = U Σ V_mᵀ, which is the frequency-weighted mean
    projected on the leading columns of U (`merge.merged`): the plain mean where all are kept.
    Sub-MoE, arXiv 2506.23266. Left out: it shares the number of clusters among the layers jointly, which no format can
    say; the variant with whitened activations.
    """
    return make_groups(k_means(found.output_cosines, n, seed), found.frequency)


def k_means(points: Doubles, n: int, seed: int) -> list[list[int]]:
    """Cluster points [m, dims] into n clusters, none of them empty, with 10 starts of k-means++; the same for a seed.

    Fewer different points than clusters: points that are alike share one, and the first of them get the others.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        labels = KMeans(n, init="k-means++", n_init=10, random_state=seed).fit(points).labels_
    clusters: dict[int, list[int]] = {}
    for point, label in enumerate(labels):
        clusters.setdefault(int(label), []).append(point)
    found = list(clusters.values())
    while len(found) < n:
        largest = max(found, key=len)
        found.append([largest.pop()])
    return found
