"""Drop and rescale, then trim, elect sign, merge."""

from __future__ import annotations

from mediator_cli.kernels.arrays import Doubles, Floats
from mediator_cli.methods._ops import (
    Keep,
    KeepChance,
    Lambda,
    Merge,
    Rescale,
    TrimDensity,
    TrimOver,
    ZeroSign,
    breaks_ties_by_majority,
    constant_chances,
    drop_and_rescale,
    dropped,
    elect_by_majority,
    kth_magnitudes,
    l1_block,
    majority_block,
    needs_l1,
    only_where_own,
    trim_count,
    trims_over,
    two_norms,
)
from mediator_cli.methods.registry import merge_method
from mediator_cli.methods.statistics import PerRow, Select, Slab, Sum, always, over_tensor


def _majority(slab: Slab) -> Doubles:
    return majority_block(dropped(slab), slab.statistics["thresholds"], slab.weights)


@merge_method(
    space="delta",
    reference="https://arxiv.org/abs/2311.03099",
    statistics=(
        Sum("l1", l1_block, over_tensor, needs_l1, two_norms),
        Select("thresholds", trim_count, trims_over, always, of=dropped),
        Sum("majority", _majority, trims_over, breaks_ties_by_majority),
    ),
    presets={
        "mergekit": {
            "density": 1.0, "rescale": "l1", "trim_density": 1.0, "trim": "tensor", "merge": "sum",
            "zero_sign": "positive",
        },
    },
    random=True,
    rows=(PerRow("chances", constant_chances, only_where_own, where_own="density"),),
    per_expert=("density",),
)  # fmt: skip
def dare_ties(
    deltas: Floats,
    weights: Doubles,
    *,
    density: KeepChance = 0.8,
    rescale: Rescale = "expected",
    trim_density: TrimDensity = 0.2,
    lambda_: Lambda = 1.0,
    merge: Merge = "mean",
    trim: TrimOver = "model",
    keep: Keep = "paper",
    zero_sign: ZeroSign = "majority",
    uniforms: Floats,
    chances: Floats | None = None,
    l1: Doubles | None = None,
    thresholds: Floats | None = None,
    majority: Doubles | None = None,
) -> Floats:
    """Drop entries at random and rescale, then merge by TIES.

    τ̂ₜ as in `dare_linear`, then trimmed, elected and averaged as in `ties`.

    Apt when experts disagree in sign and deltas are redundant enough to lose entries.

    Not apt when deltas are large, or when `ties` alone is good: what is dropped at random is noise.

    Elsewhere: the authors drop at random and then trim by magnitude; mergekit does not trim (preset `mergekit`).

    >>> import numpy as np
    >>> deltas = np.array([[4, 1, -2], [2, -3, 1]], np.float32)
    >>> keep_all = np.zeros((2, 3), np.float32)
    >>> dare_ties(deltas, np.ones(2), density=1.0, trim_density=0.4, uniforms=keep_all).tolist()
    [3.0, -3.0, -2.0]
    """
    kept = drop_and_rescale(deltas, uniforms, density if chances is None else chances, rescale, l1)
    if thresholds is None:
        thresholds = kth_magnitudes(kept, trim_count({"density": trim_density, "keep": keep}, deltas.shape[1]))
    return elect_by_majority(kept, thresholds, weights, majority, merge, zero_sign, lambda_)
