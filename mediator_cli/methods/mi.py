"""Model interpolation: a point on the line from one expert to another."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mediator_cli.kernels.arrays import Doubles, Floats
from mediator_cli.methods._ops import weighted_sum
from mediator_cli.methods.registry import merge_method


@merge_method(
    space="weight",
    reference="https://arxiv.org/abs/2510.10977",
    n_inputs=(2, 2),
    symmetric=False,
    uses_weights=False,
)
def mi(
    tensors: Floats,
    weights: Doubles,
    *,
    lambda_: Annotated[float, Field(ge=0, le=1, description="0 gives the first expert, 1 the second.")] = 0.5,
) -> Floats:
    """Interpolate between an instruct model, the first expert, and a thinking model, the second.

    λ·W₂ + (1 - λ)·W₁ for every tensor; weights of the recipe have no say.

    Apt when two models that share a base answer in different styles: λ chooses how long the merged one reasons, in
    stages rather than evenly, so try several.

    Not apt when the experts have different skills; see `task_arithmetic` and `ties`.

    >>> import numpy as np
    >>> mi(np.array([[0, 4], [8, 4]], np.float32), np.ones(2), lambda_=0.25).tolist()
    [2.0, 4.0]
    """
    return weighted_sum(tensors, [1 - lambda_, lambda_])
