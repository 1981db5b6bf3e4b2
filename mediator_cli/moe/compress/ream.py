"""REAM: the most salient experts take in those that are most like them; layer by layer, each sees the ones before."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mediator_cli.moe.compress.groups import Group, cosines, make_groups, most_important

if TYPE_CHECKING:
    from mediator_cli.kernels.arrays import Doubles
    from mediator_cli.moe.compress.statistics import LayerStatistics

CAP = 16
"""How many experts a centroid takes in, at most, as published."""


def ream(found: LayerStatistics, n: int, cap: int = CAP) -> tuple[Group, ...]:
    """Group experts around the n of highest REAP saliency: in its order each takes in up to `cap` of the nearest.

    So there are few large groups and many single experts. Where `cap` would leave experts over, it is raised.
    Members are put in the order of the centroid's inner neurons (`align.by_activations`), merged by saliency; the gates
    keep the centroid's row alone. Each layer is measured on what the merged layers before it give.
    REAM, arXiv 2604.04356. Left to us there: distances are divided by the largest of the layer.
    """
    alike = similarity(found)
    centroids = most_important(found.saliency, n)
    left = [expert for expert in range(found.n_experts) if expert not in centroids]
    room = max(cap, -(-len(left) // n))
    groups = []
    for centroid in centroids:
        near = sorted(left, key=lambda expert: (-alike[centroid, expert], expert))[:room]
        left = [expert for expert in left if expert not in near]
        groups.append([centroid, *near])
    return make_groups(groups, found.saliency)


def similarity(found: LayerStatistics) -> Doubles:
    """½ [(cos(o_i, o_j) + 1) / 2 + (1 - d_ij / max d)]; [experts, experts].

    o = mean over all tokens of softmax(z)_j · E_j(x), d = distance of the columns of router logits scaled to length 1.
    """
    gated = cosines(found.mean_gated_output @ found.mean_gated_output.T)
    distances = np.sqrt(np.maximum(2 - 2 * cosines(found.logit_products), 0.0))
    largest = distances.max()
    near = 1 - distances / largest if largest > 0 else np.ones_like(distances)
    found_: Doubles = ((gated + 1) / 2 + near) / 2
    return found_
