"""Spherical interpolation between two experts."""

from __future__ import annotations

from math import acos, sin, sqrt
from typing import Annotated

import numpy as np
from pydantic import Field

from mediator_cli.kernels.arrays import Doubles, Floats
from mediator_cli.methods._kernels import dot
from mediator_cli.methods._ops import floats, weighted_sum
from mediator_cli.methods.registry import Slab, Sum, always, merge_method, over_tensor


def _gram(slab: Slab) -> Doubles:
    return _gram_of(slab.inputs)


def _gram_of(tensors: Floats) -> Doubles:
    rows = floats(tensors)
    return np.array([dot(rows[i], rows[j]) for i, j in ((0, 0), (0, 1), (1, 1))], np.float64)


@merge_method(
    space="weight",
    reference="https://doi.org/10.1145/325165.325242",
    statistics=(Sum("gram", _gram, over_tensor, always, lambda n: (3,)),),
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

    (sin((1-t)θ)·W₁ + sin(tθ)·W₂) / sin θ with θ the angle between the tensors. Two fine-tunes of one base are
    nearly parallel, so most tensors fall under the threshold and are interpolated linearly.

    >>> slerp(np.array([[1, 0], [0, 1]], np.float32), np.ones(2), t=1.0).tolist()
    [0.0, 1.0]
    """
    first, cross, second = (_gram_of(tensors) if gram is None else gram).tolist()
    norms = [norm if norm > 1e-8 else 1.0 for norm in (sqrt(first), sqrt(second))]
    cosine = max(-1.0, min(1.0, cross / (norms[0] * norms[1])))
    if abs(cosine) > dot_threshold:
        return weighted_sum(tensors, [1 - t, t])
    angle = acos(cosine)
    return weighted_sum(tensors, [sin((1 - t) * angle) / sin(angle), sin(t * angle) / sin(angle)])
