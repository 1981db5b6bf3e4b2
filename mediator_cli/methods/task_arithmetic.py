"""Scaled sum of the experts' deltas."""

from __future__ import annotations

from mediator_cli.kernels.arrays import Doubles, Floats
from mediator_cli.methods._ops import Lambda, Normalize, total_weight, weighted_sum
from mediator_cli.methods.registry import merge_method


@merge_method(
    space="delta",
    reference="https://arxiv.org/abs/2212.04089",
    presets={"mergekit": {}, "fusion_bench": {"lambda": 0.3}},
    normalizes=lambda params: bool(params["normalize"]),
    identity_at_one=True,
)
def task_arithmetic(
    deltas: Floats,
    weights: Doubles,
    *,
    lambda_: Lambda = 1.0,
    normalize: Normalize = False,
) -> Floats:
    """Add the deltas to the base: W₀ + λ · Σ wₜ·τₜ.

    All changes are added as they are: nothing is trimmed, no sign is elected.

    Apt when there are few experts with little overlap.

    Not apt when there are many experts, unless λ is near 1/n: the sum overshoots otherwise.

    Elsewhere: fusion_bench has λ = 0.3 (preset); mergekit can divide by the sum of the weights (`normalize`).

    >>> import numpy as np
    >>> task_arithmetic(np.array([[1, 0], [2, 4]], np.float32), np.array([1.0, 0.5])).tolist()
    [2.0, 2.0]
    """
    return weighted_sum(deltas, weights, total_weight(weights) if normalize else 1.0, lambda_)
