"""Weighted average of the experts' parameters."""

from __future__ import annotations

import torch

from mediator_cli.methods._ops import Normalize, total_weight, weighted_sum
from mediator_cli.methods.registry import merge_method


@merge_method(
    space="weight",
    reference="https://arxiv.org/abs/2203.05482",
    identity_at_one=True,
    normalizes=lambda params: bool(params["normalize"]),
)
def linear(
    tensors: torch.Tensor,
    weights: torch.Tensor,
    *,
    normalize: Normalize = True,
) -> torch.Tensor:
    """Average the experts: Σ wₜ·Wₜ / Σ wₜ.

    The plain average of checkpoints, also called model soup. Sums run in recipe order in float32, with one
    division at the end. Apt when the experts are close to each other; conflicting changes cancel.

    >>> linear(torch.tensor([[2.0, 4.0], [4.0, 0.0]]), torch.tensor([1.0, 1.0]))
    tensor([3., 2.])
    """
    total = weighted_sum(tensors, weights)
    return total / total_weight(weights) if normalize else total
