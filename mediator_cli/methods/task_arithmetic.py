"""Scaled sum of the experts' deltas."""

from __future__ import annotations

import torch

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
    deltas: torch.Tensor,
    weights: torch.Tensor,
    *,
    lambda_: Lambda = 1.0,
    normalize: Normalize = False,
) -> torch.Tensor:
    """Add the deltas to the base: W₀ + λ · Σ wₜ·τₜ.

    Apt for few experts with little overlap. With many experts choose λ near 1/n; the sum overshoots otherwise.

    >>> task_arithmetic(torch.tensor([[1.0, 0.0], [2.0, 4.0]]), torch.tensor([1.0, 0.5]))
    tensor([2., 2.])
    """
    total = weighted_sum(deltas, weights)
    return (total / total_weight(weights) if normalize else total) * lambda_
