"""Spherical interpolation between two experts."""

from __future__ import annotations

from math import acos, sqrt
from typing import Annotated

from pydantic import Field

from mediator_cli.kernels.arrays import Doubles, Floats
from mediator_cli.methods._gram import arc, gram_block, gram_of, square
from mediator_cli.methods._ops import weighted_sum
from mediator_cli.methods.registry import merge_method
from mediator_cli.methods.statistics import Sum, always, over_tensor


@merge_method(
    space="weight",
    reference="https://doi.org/10.1145/325165.325242",
    statistics=(Sum("gram", gram_block, over_tensor, always, square),),
    n_inputs=(2, 2),
    symmetric=False,
    uses_weights=False,
)
def slerp(
    tensors: Floats,
    weights: Doubles,
    *,
    t: Annotated[float, Field(ge=0, le=1, description="0 gives the first expert, 1 the second.")] = 0.5,
    dot_threshold: Annotated[
        float, Field(gt=0, le=1, description="Interpolate linearly above this |cosine|.")
    ] = 0.9995,
    gram: Doubles | None = None,
) -> Floats:
    """Interpolate two experts along the great circle between them, each tensor as one vector.

    (sin((1-t)θ)·W₁ + sin(tθ)·W₂) / sin θ with θ the angle between the tensors.

    Apt when two experts differ much. Between experts whose deltas are less than about 2 % of the base it is a
    straight line: their cosine lies above 0.9995.

    Not apt when an arc between the changes is meant: two fine-tunes of one base are nearly parallel, so most tensors
    are interpolated linearly. `nuslerp` turns the deltas instead.

    >>> import numpy as np
    >>> slerp(np.array([[1, 0], [0, 1]], np.float32), np.ones(2), t=1.0).tolist()
    [0.0, 1.0]
    """
    found = gram_of(tensors) if gram is None else gram
    norms = [norm if norm > 1e-8 else 1.0 for norm in (sqrt(found[0, 0]), sqrt(found[1, 1]))]
    cosine = max(-1.0, min(1.0, float(found[0, 1]) / (norms[0] * norms[1])))
    if abs(cosine) > dot_threshold:
        return weighted_sum(tensors, [1 - t, t])
    return weighted_sum(tensors, arc(t, acos(cosine)))
