"""Average of checkpoints of one run, weighted by a metric of each."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from mediator_cli.kernels.arrays import Doubles, Floats
from mediator_cli.methods._ops import weighted_sum
from mediator_cli.methods.registry import merge_method

Metric = Literal["loss", "steps"]


def _shares(metrics: Doubles, metric: Metric, penalty: float) -> Doubles:
    """Turn metrics [n], above zero, into shares that sum to one; in logarithms, so that no power overflows."""
    powers = np.log(metrics) * (-penalty if metric == "loss" else penalty)
    shares = np.exp(powers - powers.max())
    mean: Doubles = shares / shares.sum()
    return mean


@merge_method(
    space="weight",
    reference="https://arxiv.org/abs/2504.18580",
    identity_at_one=True,
    positive_weights=True,
)
def metrics_weighted_like(
    tensors: Floats,
    weights: Doubles,
    *,
    metric: Annotated[
        Metric, Field(description="What the experts' weights are: training losses, less is better, or steps.")
    ] = "loss",
    penalty: Annotated[
        float, Field(ge=0, allow_inf_nan=False, description="How much a better metric weighs; 0 is the plain average.")
    ] = 1.0,
) -> Floats:
    """Average checkpoints of one run by how good each was: the recipe's weights are their metrics.

    Σ sₜ·Wₜ with sₜ = wₜ^-penalty / Σ (loss), or wₜ^penalty / Σ (steps). wₜ is the weight of the expert in the recipe:
    its training loss or its number of steps, which must be above zero. Equal weights, the default, give the plain
    average.

    Apt when checkpoints or adapters of one fine-tuning are at hand with their training log; the authors found losses
    to work better than steps.

    Not apt when the experts are of different tasks: their losses do not compare.

    Uncertain: the paper's formula was not at hand. Its abstract has weights from a metric with one penalty; the power
    is the natural form of that, and its default a guess.

    >>> metrics_weighted_like(np.array([[0, 4], [4, 0]], np.float32), np.array([1.0, 3.0])).tolist()
    [1.0, 3.0]
    """
    return weighted_sum(tensors, _shares(weights, metric, penalty))
