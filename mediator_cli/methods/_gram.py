"""Inner products of the experts in float64, and what follows from them: norms, angles, sums on spheres.

A sum of the experts whose coefficients depend on norms and angles alone needs nothing of a tensor but its Gram matrix.
In float64 that of a billion entries is exact to about 1e-13. Between nearly parallel tensors an angle comes out only
to 1e-6 of itself, but the coefficients on an arc then depend on its square, which no float32 can show.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from mediator_cli.kernels.arrays import Doubles, Floats
from mediator_cli.methods import _kernels_averages as kernels
from mediator_cli.methods._ops import floats
from mediator_cli.methods.statistics import Params, Slab, Space

SpaceChoice = Annotated[
    Literal["delta", "weight"],
    Field(description="Merge the experts' weights as they are, or their deltas, which are added to the base."),
]


def space_of(params: Params) -> Space:
    """Give the space that the parameter `space` asks for."""
    space: Space = params["space"]
    return space


def square(n: int) -> tuple[int, ...]:
    """Give the shape of a Gram matrix of n inputs."""
    return n, n


def gram_of(tensors: Floats) -> Doubles:
    """Find the inner products of tensors [n, m], each as one vector; float64 [n, n]."""
    gram: Doubles = row_grams(tensors[:, None])[0]
    return gram


def row_grams(rows: Floats) -> Doubles:
    """Find the inner products of rows [n, rows, length] that stand side by side; float64 [rows, n, n]."""
    grams = np.empty((rows.shape[1], len(rows), len(rows)), np.float64)
    kernels.row_grams(floats(rows), grams)
    return grams


def gram_block(slab: Slab) -> Doubles:
    """Find the inner products of one block."""
    return gram_of(slab.inputs)


def norms_of(grams: Doubles) -> Doubles:
    """Read norms [..., n] from Gram matrices [..., n, n]."""
    norms: Doubles = np.sqrt(np.diagonal(grams, axis1=-2, axis2=-1))
    return norms


def angles_of(grams: Doubles, least_norm: float) -> Doubles:
    """Read the angle of each pair from Gram matrices [..., 2, 2]; norms count as `least_norm` at least; float64 [...].

    The root of the product, not the product of roots: equal or opposite vectors then have exactly the angle 0 or π.
    """
    first, second = (np.maximum(grams[..., i, i], least_norm**2) for i in (0, 1))
    cosines = grams[..., 0, 1] / np.sqrt(first * second)
    angles: Doubles = np.arccos(np.clip(cosines, -1.0, 1.0))
    return angles


def arc(t: float, angle: float, flat: float = 1e-8) -> list[float]:
    """Give the two coefficients of slerp; those of a straight line where the sine of the angle is below `flat`."""
    return list(kernels.arc(float(t), float(angle), float(flat)))
