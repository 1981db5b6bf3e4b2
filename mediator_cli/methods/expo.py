"""Model extrapolation: further along the way that training went."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mediator_cli.kernels.arrays import Doubles, Floats
from mediator_cli.methods._ops import total_weight, weighted_sum
from mediator_cli.methods.registry import merge_method
from mediator_cli.methods.statistics import always


@merge_method(
    space="delta",
    reference="https://arxiv.org/abs/2404.16792",
    presets={"fusion_bench": {"alpha": 0.1}},
    normalizes=always,
)
def expo(
    deltas: Floats,
    weights: Doubles,
    *,
    alpha: Annotated[
        float, Field(ge=-1, allow_inf_nan=False, description="How much further, as a share of the way; -1 is the base.")
    ] = 0.3,
) -> Floats:
    """Go on from the base beyond the expert: W₁ + α·(W₁ - W₀).

    W₀ + (1 + α)·τ, with τ = Σ wₜ·τₜ / Σ wₜ for more than one expert.

    Apt when the base is the supervised fine-tune and the expert was aligned from it by preferences for few steps.

    Not apt when the expert learned facts or a new skill: what lies beyond it was never trained. Large α breaks the
    model; try a few values below 0.5.

    Elsewhere: the authors call 0.3 or 0.5 usually good and choose by a reward model; fusion_bench has 0.1.

    >>> import numpy as np
    >>> expo(np.array([[2, -4]], np.float32), np.ones(1), alpha=0.5).tolist()
    [3.0, -6.0]
    """
    return weighted_sum(deltas, weights, total_weight(weights), 1 + alpha)
