"""Keep the largest change of each entry."""

from __future__ import annotations

import numpy as np

from mediator_cli.kernels.arrays import Doubles, Floats
from mediator_cli.methods._kernels_averages import add_largest
from mediator_cli.methods._ops import Lambda, floats
from mediator_cli.methods.registry import merge_method


@merge_method(
    space="delta",
    reference="https://arxiv.org/abs/2407.06322",
    symmetric=False,
    identity_at_one=True,
)
def magmax(
    deltas: Floats,
    weights: Doubles,
    *,
    lambda_: Lambda = 0.5,
) -> Floats:
    """Take of each entry the expert's change with the largest magnitude, and scale: W₀ + λ·τ*.

    τ*ⱼ = the wₜ·τₜⱼ of largest magnitude; of equally large ones that of the later expert.

    Apt when experts were fine-tuned one after the other, each from the one before, with all deltas taken against the
    first base: large changes then mark what a task needs. The order of the recipe is that of training.

    Not apt when experts are many and unrelated: every entry takes part, so the result is longer than any delta, and
    λ has to be small. One expert with large changes everywhere drowns the others.

    >>> magmax(np.array([[4, -2, 1], [-2, -6, -1]], np.float32), np.ones(2)).tolist()
    [2.0, -3.0, -0.5]
    """
    merged = np.empty(deltas.shape[1], np.float32)
    add_largest(floats(deltas), floats(weights), np.float32(lambda_), merged)
    return merged
