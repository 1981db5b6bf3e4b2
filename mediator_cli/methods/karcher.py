"""The mean of the experts' directions on the sphere."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from mediator_cli.kernels.arrays import Doubles, Floats
from mediator_cli.methods._gram import SpaceChoice, gram_block, gram_of, norms_of, space_of, square
from mediator_cli.methods._ops import total_weight, weighted_sum
from mediator_cli.methods.registry import merge_method
from mediator_cli.methods.statistics import Sum, always, over_tensor


def _coefficients(gram: Doubles, shares: Doubles, max_iter: int, tol: float) -> Doubles:
    """Give what each expert is multiplied by, from the Gram matrix [n, n]; short ones have no direction."""
    norms = norms_of(gram)
    long = norms > tol
    total = shares[long].sum()
    if total == 0:
        return shares
    coefficients = np.zeros(len(norms))
    cosines = gram[np.ix_(long, long)] / np.outer(norms[long], norms[long])
    mean = _mean_direction(cosines, shares[long] / total, max_iter, tol)
    coefficients[long] = (shares @ norms) * mean / norms[long]
    return coefficients


def _mean_direction(cosines: Doubles, shares: Doubles, max_iter: int, tol: float) -> Doubles:
    """Find the mean of unit vectors with these cosines [n, n], as a sum of them with coefficients [n]."""
    length = _length(shares, cosines)
    mean = shares / length if length >= tol else np.eye(len(shares))[0]
    for _ in range(max_iter):
        tangent = _tangent(mean, cosines, shares, tol)
        angle = _length(tangent, cosines)
        if angle < tol:
            break
        mean = np.cos(angle) * mean + np.sin(angle) / angle * tangent
        mean = mean / max(_length(mean, cosines), tol)
    return mean


def _tangent(mean: Doubles, cosines: Doubles, shares: Doubles, tol: float) -> Doubles:
    """Sum the ways from the mean to each unit vector, whose length is the angle; coefficients [n].

    To a vector just opposite, all ways are equally long, and none is gone.
    """
    along = np.clip(cosines @ mean, -1.0, 1.0)
    angles = np.arccos(along)
    open_ways = (angles >= tol) & (angles <= np.pi - tol)
    factors = np.where(open_ways, shares * angles / np.where(open_ways, np.sin(angles), 1.0), 0.0)
    tangent: Doubles = factors - (factors @ along) * mean
    return tangent


def _length(coefficients: Doubles, cosines: Doubles) -> float:
    return float(np.sqrt(max(0.0, float(coefficients @ cosines @ coefficients))))


@merge_method(
    space=space_of,
    reference="https://doi.org/10.1002/cpa.3160300502",
    statistics=(Sum("gram", gram_block, over_tensor, always, square),),
    normalizes=always,
)
def karcher(
    tensors: Floats,
    weights: Doubles,
    *,
    space: SpaceChoice = "weight",
    max_iter: Annotated[int, Field(ge=0, le=1000, description="Steps towards the mean, at most.")] = 10,
    tol: Annotated[float, Field(gt=0, le=1e-2, description="Angles, steps and norms below this count as zero.")] = 1e-5,
    gram: Doubles | None = None,
) -> Floats:
    """Find the mean of the experts' directions on the sphere, and give it their average length.

    Each tensor is one vector; uₜ = xₜ / ‖xₜ‖. From u = normalise(Σ wₜ·uₜ), u moves by the mean of the arcs to all uₜ
    until it stays where it is: the point with the least sum of squared angles. The result is (Σ wₜ·‖xₜ‖) · u with
    Σ wₜ = 1. Tensors no longer than `tol` have no direction, and where all are so short the result is their average;
    where the directions cancel, u starts at the first. All steps are taken on the experts' inner products, so the
    tensors are read but twice, however many steps there are.

    Apt when a few experts' changes differ much in direction; then use `space: delta`.

    Not apt when `space` is `weight` and the experts are fine-tunes of one base: all angles are small, and the
    mean on the sphere is their average to the last digits.

    Elsewhere: mergekit merges the weights, all with the same weight. Here those of the recipe count.

    >>> karcher(np.array([[3, 0], [0, 3]], np.float32), np.array([1.0, 0.0])).tolist()
    [3.0, 0.0]
    """
    shares = weights / total_weight(weights)
    return weighted_sum(tensors, _coefficients(gram_of(tensors) if gram is None else gram, shares, max_iter, tol))
