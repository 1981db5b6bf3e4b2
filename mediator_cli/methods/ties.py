"""Trim, elect sign, merge."""

from __future__ import annotations

import numpy as np

from mediator_cli.kernels.arrays import Doubles, Floats
from mediator_cli.methods._ops import (
    Keep,
    Lambda,
    Merge,
    TrimDensity,
    TrimOver,
    TrimRescale,
    ZeroSign,
    breaks_ties_by_majority,
    elect_by_majority,
    kth_magnitudes,
    majority_block,
    needs_l1,
    norms_of,
    restored,
    trim_count,
    trimmed,
    trims_over,
    two_norms,
)
from mediator_cli.methods.registry import merge_method
from mediator_cli.methods.statistics import Select, Slab, Sum, always, over_tensor


def _l1(slab: Slab) -> Doubles:
    return norms_of(slab.inputs, trimmed(slab.inputs, slab.statistics["thresholds"]))


def _majority(slab: Slab) -> Doubles:
    scaled = _rescaled(slab.inputs, slab.statistics["thresholds"], slab.params["rescale"], slab.statistics.get("l1"))
    return majority_block(*scaled, slab.weights)


def _rescaled(deltas: Floats, thresholds: Floats, rescale: TrimRescale, l1: Doubles | None) -> tuple[Floats, Floats]:
    """Give deltas [n, m] and thresholds [n], or trimmed ones with their former norm and thresholds of zero."""
    if rescale == "none":
        return deltas, thresholds
    return restored(deltas, trimmed(deltas, thresholds), rescale, l1), np.zeros(len(deltas), np.float32)


@merge_method(
    space="delta",
    reference="https://arxiv.org/abs/2306.01708",
    statistics=(
        Select("thresholds", trim_count, trims_over, always),
        Sum("l1", _l1, over_tensor, needs_l1, two_norms),
        Sum("majority", _majority, trims_over, breaks_ties_by_majority),
    ),
    presets={
        "mergekit": {"density": 1.0, "trim": "tensor", "keep": "exact", "zero_sign": "positive"},
        "fusion_bench": {"lambda": 0.3, "merge": "sum"},
        "mergeme": {"density": 0.8, "lambda": 1 / 3, "merge": "sum"},
        "mergelm": {"keep": "dropped"},
        "mergellm": {"trim": "tensor", "keep": "dropped"},
    },
    per_expert=("density",),
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
    rescale: TrimRescale = "none",
    thresholds: Floats | None = None,
    l1: Doubles | None = None,
    majority: Doubles | None = None,
) -> Floats:
    """Keep each expert's largest changes, elect one sign for each entry, average what agrees with it.

    τ̂ₜ = the top `density` of τₜ by magnitude; γ = sign(Σ wₜ·τ̂ₜ); the result is λ · mean of the wₜ·τ̂ₜ whose sign
    is γ. Entries that share the threshold's magnitude all stay, so slightly more than the share may be kept.

    Apt when experts change the same entries in opposite directions.

    Not apt when small changes carry the skill: trimming drops four in five.

    Elsewhere: the authors rank over the model; mergekit and MergeLLM per tensor. mergekit trims nothing unless told to,
    and a tie of signs counts as plus there. fusion_bench sums what agrees and has λ = 0.3.
    MergeME sums too, with λ = 1/3, and trims a fifth: for all that the experts of a mixture share.

    >>> ties(np.array([[4, 1, -2], [2, -3, 1]], np.float32), np.ones(2), density=0.4).tolist()
    [3.0, -3.0, -2.0]
    """
    if thresholds is None:
        thresholds = kth_magnitudes(deltas, trim_count({"density": density, "keep": keep}, deltas.shape[1]))
    deltas, thresholds = _rescaled(deltas, thresholds, rescale, l1)
    return elect_by_majority(deltas, thresholds, weights, majority, merge, zero_sign, lambda_)
