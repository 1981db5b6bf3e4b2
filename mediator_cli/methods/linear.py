"""Weighted average of the experts' parameters."""

from __future__ import annotations

from mediator_cli.kernels.arrays import Doubles, Floats
from mediator_cli.methods._ops import Normalize, total_weight, weighted_sum
from mediator_cli.methods.registry import merge_method


@merge_method(
    space="weight",
    reference="https://arxiv.org/abs/2203.05482",
    identity_at_one=True,
    normalizes=lambda params: bool(params["normalize"]),
)
def linear(
    tensors: Floats,
    weights: Doubles,
    *,
    normalize: Normalize = True,
) -> Floats:
    """Average the experts: Σ wₜ·Wₜ / Σ wₜ.

    The plain average of checkpoints. With equal weights, the default, it is the uniform model soup: all experts go in,
    none is chosen by how it scores as in a greedy soup. Sums run in recipe order in float32, with one division at the
    end.

    Apt when the experts are close to each other, such as runs of one task with other seeds or settings.

    Not apt when experts of many tasks are merged: changes that conflict cancel, and each keeps but its share.

    >>> import numpy as np
    >>> linear(np.array([[2, 4], [4, 0]], np.float32), np.ones(2)).tolist()
    [3.0, 2.0]
    """
    return weighted_sum(tensors, weights, total_weight(weights) if normalize else 1.0)
