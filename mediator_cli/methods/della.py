"""Drop by rank and rescale, then elect sign, merge."""

from __future__ import annotations

from mediator_cli.kernels.arrays import Doubles, Floats
from mediator_cli.methods._ops import (
    KeepChance,
    Lambda,
    Merge,
    Rescale,
    drop_and_rescale,
    elect,
    l1_block,
    needs_l1,
    two_norms,
)
from mediator_cli.methods._ranks import Epsilon, check_chances, drops_some, rank_chances, ranked_chances
from mediator_cli.methods.registry import merge_method
from mediator_cli.methods.statistics import PerRow, Sum, over_tensor


@merge_method(
    space="delta",
    reference="https://arxiv.org/abs/2406.11617",
    statistics=(Sum("l1", l1_block, over_tensor, needs_l1, two_norms),),
    rows=(PerRow("chances", rank_chances, drops_some),),
    presets={"mergekit": {"density": 1.0, "epsilon": 0.15, "rescale": "l1", "lambda": 1.0}},
    random=True,
    per_expert=("density", "epsilon"),
    check=check_chances,
)
def della(
    deltas: Floats,
    weights: Doubles,
    *,
    density: KeepChance = 0.7,
    epsilon: Epsilon = 0.07,
    rescale: Rescale = "expected",
    lambda_: Lambda = 1.1,
    merge: Merge = "mean",
    uniforms: Floats,
    chances: Floats | None = None,
    l1: Doubles | None = None,
) -> Floats:
    """Drop entries at random, small ones more often, then elect signs and merge as TIES does.

    The chance to stay grows with the rank r of the magnitude among the n of its row:
    p = density - ε + 2ε·(r-1)/(n-1); what stays is divided by p (`rescale: expected`) or restores the L1 norm of its
    tensor (mergekit). A tie of signs counts as plus.

    Apt when `dare_ties` is, and large changes matter more than small ones.

    Not apt when rows are short: ranks in them say little.

    Elsewhere: defaults follow the authors' example, ε is half their window; preset `mergekit` has its ε and L1 norm.

    >>> import numpy as np
    >>> deltas, drawn = np.array([[2, 5, -1]], np.float32), np.array([[0.6, 0.6, 0.6]], np.float32)
    >>> della(deltas, np.ones(1), density=0.5, epsilon=0.125, lambda_=1.0, uniforms=drawn).tolist()
    [0.0, 8.0, 0.0]
    """
    kept = drop_and_rescale(deltas, uniforms, ranked_chances(deltas, density, epsilon, chances), rescale, l1)
    return elect(kept, None, weights, weights, merge=merge, factor=lambda_)
