"""Crossover of two experts: nearer to one before a point of the model, nearer to the other after it."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from mediator_cli.kernels.arrays import Counts, Doubles, Floats
from mediator_cli.methods._gram import angles_of, arc, gram_block, gram_of, square
from mediator_cli.methods._ops import weighted_sum
from mediator_cli.methods.registry import merge_method
from mediator_cli.methods.statistics import Over, Params, Position, Sum, always

_FLAT = 1e-6
"""The sine of the angle up to which the arc is a straight line."""
_LEAST_NORM = 1e-30


def _over_model(params: Params) -> Over:
    return "model"


@merge_method(
    space="weight",
    reference="https://arxiv.org/abs/2508.16204",
    statistics=(Sum("gram", gram_block, _over_model, always, square), Position("place", always)),
    n_inputs=(2, 2),
    symmetric=False,
    uses_weights=False,
)
def m2n2_crossover(
    tensors: Floats,
    weights: Doubles,
    *,
    t: Annotated[
        float, Field(ge=0, le=1, description="0 gives the first expert before the split, 1 the second.")
    ] = 0.25,
    split: Annotated[
        float, Field(ge=0, le=1, description="Where the model is split, as a share of its entries.")
    ] = 0.5,
    gram: Doubles | None = None,
    place: Counts | None = None,
) -> Floats:
    """Cross two experts along the arc between them: at t before a split of the model, at 1 - t after it.

    (sin((1-v)θ)·W₁ + sin(vθ)·W₂) / sin θ with θ the angle between the models, each as one vector of all its entries,
    and v = t for the first round(split·entries) of them, 1 - t for all others; a straight line where sin θ is 1e-6 or
    less. Entries are counted through the tensors in the plan's order, by layer, and within a tensor as it is stored.
    Only tensors that are merged this way with the same choices are the model.

    Apt when many children of two parents are tried in a search, each with a t and a split of its own drawn at random,
    as the authors do. This is their crossover alone: which child survives, a benchmark has to say.

    Not apt when a single merge is wanted: nothing says where the split should be.

    >>> m2n2_crossover(np.array([[1, 2, 3, 4], [2, 4, 6, 8]], np.float32), np.ones(2), t=0.0).tolist()
    [1.0, 2.0, 6.0, 8.0]
    """
    m = tensors.shape[1]
    first, total = (0, m) if place is None else place.tolist()
    before = min(max(round(split * total) - first, 0), m)
    angle = float(angles_of(gram_of(tensors) if gram is None else gram, _LEAST_NORM))
    parts = [
        weighted_sum(tensors[:, :before], arc(t, angle, _FLAT)),
        weighted_sum(tensors[:, before:], arc(1 - t, angle, _FLAT)),
    ]
    return np.concatenate(parts)
