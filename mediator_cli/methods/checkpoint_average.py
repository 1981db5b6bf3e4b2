"""Average of checkpoints of one training run, by their order."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from mediator_cli.kernels.arrays import Doubles, Floats
from mediator_cli.methods._ops import weighted_sum
from mediator_cli.methods.registry import merge_method

Schedule = Literal["sma", "ema", "wma"]


def _shares(n: int, schedule: Schedule, alpha: float) -> Doubles:
    """Give the shares of n checkpoints, the first one first; they sum to one."""
    numbers = np.arange(1, n + 1, dtype=np.float64)
    if schedule == "ema":
        shares = alpha * (1 - alpha) ** (n - numbers)
        shares[0] = (1 - alpha) ** (n - 1)
        return shares
    counts = numbers if schedule == "wma" else np.ones(n)
    mean: Doubles = counts / counts.sum()
    return mean


@merge_method(
    space="weight",
    reference="https://arxiv.org/abs/2505.12082",
    symmetric=False,
    identity_at_one=True,
    uses_weights=False,
)
def checkpoint_average(
    tensors: Floats,
    weights: Doubles,
    *,
    schedule: Annotated[
        Schedule,
        Field(
            description="sma: all alike. ema: later ones more, in powers of 1-alpha. wma: later ones more, linearly."
        ),
    ] = "sma",
    alpha: Annotated[float, Field(gt=0, lt=1, description="ema: share of each new checkpoint.")] = 0.2,
) -> Floats:
    """Average checkpoints of one run, in recipe order from the earliest to the latest.

    Σ sᵢ·Wᵢ over N checkpoints: sᵢ = 1/N (`sma`); α(1-α)^(N-i), the first (1-α)^(N-1) (`ema`: M ← α·Wᵢ + (1-α)·M);
    i / Σ i (`wma`). Weights of the recipe have no say.

    Apt when the checkpoints come from the part of a pre-training with constant learning rate, at even distances: the
    average shows what annealing would reach. The authors take about ten, 4 to 80 billion tokens apart by model size,
    and settled for `sma`; `wma` was best early.

    Not apt when the learning rate falls between the checkpoints, or when they are of different runs; see `linear`.

    >>> checkpoint_average(np.array([[0, 3], [6, 9]], np.float32), np.ones(2), schedule="wma").tolist()
    [4.0, 7.0]
    """
    return weighted_sum(tensors, _shares(len(tensors), schedule, alpha))
