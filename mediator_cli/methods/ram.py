"""Average what several experts changed, and keep what one alone did."""

from __future__ import annotations

import numpy as np

from mediator_cli.kernels.arrays import Doubles, Floats
from mediator_cli.methods._shared_changes import Epsilon, merge_shared
from mediator_cli.methods.registry import merge_method


@merge_method(space="delta", reference="https://arxiv.org/abs/2601.13572")
def ram(
    deltas: Floats,
    weights: Doubles,
    *,
    epsilon: Epsilon = 1e-5,
) -> Floats:
    """Average each entry over those experts that changed it by more than ε.

    W₀ + Σ wₜ·τₜ / k over the k experts with |τₜ| > ε; an entry that one expert alone changed is kept whole, and one
    that none did stays the base's.

    Apt when experts were trained by reinforcement, which changes few entries: an average over all experts would
    shrink what only one of them learned.

    Not apt when deltas are dense: then all experts changed everything, and it is the plain average. ε has to lie
    above the rounding of the stored dtype.

    >>> ram(np.array([[4, 2, 0], [2, 0, 0]], np.float32), np.ones(2)).tolist()
    [3.0, 2.0, 0.0]
    """
    return merge_shared(deltas, weights, epsilon, np.ones(len(deltas)))
