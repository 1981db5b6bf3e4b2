"""Trim, elect sign, merge."""

from __future__ import annotations

from mediator_cli.kernels.arrays import Doubles, Floats
from mediator_cli.methods._ops import (
    Keep,
    Lambda,
    Merge,
    TrimDensity,
    TrimOver,
    ZeroSign,
    breaks_ties_by_majority,
    elect_by_majority,
    kth_magnitudes,
    majority_block,
    trim_count,
    trims_over,
)
from mediator_cli.methods.registry import Select, Slab, Sum, always, merge_method


def _majority(slab: Slab) -> Doubles:
    return majority_block(slab.inputs, slab.statistics["thresholds"], slab.weights)


@merge_method(
    space="delta",
    reference="https://arxiv.org/abs/2306.01708",
    statistics=(
        Select("thresholds", trim_count, trims_over, always),
        Sum("majority", _majority, trims_over, breaks_ties_by_majority),
    ),
    presets={
        "mergekit": {"density": 1.0, "trim": "tensor", "keep": "exact", "zero_sign": "positive"},
        "fusion_bench": {"lambda": 0.3, "merge": "sum"},
        "mergelm": {"keep": "dropped"},
        "mergellm": {"trim": "tensor", "keep": "dropped"},
    },
)
def ties(
    deltas: Floats,
    weights: Doubles,
    *,
    density: TrimDensity = 0.2,
    lambda_: Lambda = 1.0,
    merge: Merge = "mean",
    trim: TrimOver = "model",
    keep: Keep = "paper",
    zero_sign: ZeroSign = "majority",
    thresholds: Floats | None = None,
    majority: Doubles | None = None,
) -> Floats:
    """Keep each expert's largest changes, elect one sign for each entry, average what agrees with it.

    τ̂ₜ = the top `density` of τₜ by magnitude; γ = sign(Σ wₜ·τ̂ₜ); the result is λ · mean of the wₜ·τ̂ₜ whose sign
    is γ. Entries that share the threshold's magnitude all stay, so slightly more than the share may be kept.
    Apt when experts change the same entries in opposite directions. Preset `mergekit` trims per tensor.

    >>> import numpy as np
    >>> ties(np.array([[4, 1, -2], [2, -3, 1]], np.float32), np.ones(2), density=0.4).tolist()
    [3.0, -3.0, -2.0]
    """
    if thresholds is None:
        thresholds = kth_magnitudes(deltas, trim_count({"density": density, "keep": keep}, deltas.shape[1]))
    return elect_by_majority(deltas, thresholds, weights, majority, merge, zero_sign, lambda_)
