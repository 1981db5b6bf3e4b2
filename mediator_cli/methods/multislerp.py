"""Spherical average of many experts, by way of the mean of their directions."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from mediator_cli.kernels.arrays import Doubles, Floats
from mediator_cli.methods._gram import SpaceChoice, gram_block, gram_of, norms_of, space_of, square
from mediator_cli.methods._ops import Normalize, total_weight, weighted_sum
from mediator_cli.methods.registry import merge_method
from mediator_cli.methods.statistics import Sum, always, over_tensor

_NO_DIRECTION = 1e-6
"""The length of a mean of directions below which rounding decides where it points."""


def _coefficients(gram: Doubles, shares: Doubles, eps: float) -> Doubles:
    """Give what each expert is multiplied by, from the Gram matrix [n, n]."""
    norms = norms_of(gram)
    directions = shares / (norms + eps)
    length = np.sqrt(max(0.0, float(directions @ gram @ directions)))
    if length < max(eps, _NO_DIRECTION):
        return shares
    coefficients: Doubles = directions * ((shares @ norms) / length)
    return coefficients


@merge_method(
    space=space_of,
    reference="https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md",
    statistics=(Sum("gram", gram_block, over_tensor, always, square),),
    normalizes=lambda params: bool(params["normalize"]),
)
def multislerp(
    tensors: Floats,
    weights: Doubles,
    *,
    space: SpaceChoice = "delta",
    normalize: Normalize = True,
    eps: Annotated[float, Field(gt=0, le=1e-3, description="Added to norms before they divide.")] = 1e-8,
    gram: Doubles | None = None,
) -> Floats:
    """Average the experts' directions, and give the result their average length.

    (Σ wₜ·‖xₜ‖) · normalise(Σ wₜ·xₜ / ‖xₜ‖) for each tensor as one vector; x are the deltas, or the weights themselves
    with `space: weight`. Where the directions cancel to less than 1e-6 there is no mean direction, and it is the
    weighted average Σ wₜ·xₜ.

    Apt when many experts' changes are alike in size and differ in direction: an average would shrink them.

    Not apt when experts agree or when some hardly moved: each direction counts the same, however short its delta.

    Elsewhere: mergekit describes a step along the tangents at the mean direction. That step is zero by construction,
    so this is the same in closed form. It refuses tensors that no expert changed; here they stay the base's.

    >>> multislerp(np.array([[3, 4], [3, -4]], np.float32), np.ones(2)).round(3).tolist()
    [5.0, 0.0]
    """
    shares = weights / total_weight(weights) if normalize else weights
    return weighted_sum(tensors, _coefficients(gram_of(tensors) if gram is None else gram, shares, eps))
