"""Spherical interpolation between two experts' changes, or between the experts, by their weights."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from mediator_cli.kernels.arrays import Doubles, Floats
from mediator_cli.methods import _kernels_averages as kernels
from mediator_cli.methods._gram import SpaceChoice, angles_of, arc, gram_block, gram_of, row_grams, space_of, square
from mediator_cli.methods._ops import floats, total_weight, weighted_sum
from mediator_cli.methods.registry import merge_method
from mediator_cli.methods.statistics import Params, PerRow, Role, Sum, View, over_tensor

_LEAST_NORM = 1e-7
"""Shorter vectors count as so long, so that one of zeros stands at a right angle to all."""
_FLAT = 1e-8
"""The sine of the angle below which the arc is a straight line."""


def _view(role: Role, params: Params) -> View:
    return "transposed" if params["over"] == "column" else "elements"


def _over_rows(params: Params) -> bool:
    return bool(params["over"] == "row")


def _not_over_rows(params: Params) -> bool:
    return not _over_rows(params)


def _row_angles(rows: Floats) -> Doubles:
    """Find the angle of each pair of rows [2, rows, length]; float64 [rows]."""
    return angles_of(row_grams(rows), _LEAST_NORM)


def _angles_in_rows(rows: Floats, params: Params) -> Doubles:
    return np.broadcast_to(_row_angles(rows)[None, :, None], rows.shape)


def _angle_bytes(n: int, rows: int, columns: int) -> int:
    """Count the bytes of an angle for each entry, and of the result, with what is left of a copy."""
    return (8 + 4 + 4) * rows * columns


@merge_method(
    space=space_of,
    reference="https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md",
    view=_view,
    working_bytes=_angle_bytes,
    statistics=(Sum("gram", gram_block, over_tensor, _not_over_rows, square),),
    rows=(PerRow("angles", _angles_in_rows, _over_rows),),
    n_inputs=(2, 2),
)
def nuslerp(
    tensors: Floats,
    weights: Doubles,
    *,
    space: SpaceChoice = "delta",
    over: Annotated[
        Literal["tensor", "row", "column"],
        Field(description="What is one vector: a tensor, or each row (last axis) or column of a matrix."),
    ] = "tensor",
    gram: Doubles | None = None,
    angles: Doubles | None = None,
) -> Floats:
    """Interpolate two experts' changes along the arc between them, by their weights.

    (sin((1-t)θ)·x₁ + sin(tθ)·x₂) / sin θ with t = w₂ / (w₁ + w₂), 0.5 where the weights cancel, and θ the angle between
    x₁ and x₂: the deltas, or the weights themselves with `space: weight`. Where sin θ < 1e-8 it is the straight line. A
    vector is one row, and one column; so is a matrix that has but one. Angles come from sums in float64.

    Apt when two fine-tunes of one base point in different directions: an average would be shorter than either.

    Not apt when `space` is `weight` and both are fine-tunes of one base: they are nearly parallel, θ is near 0, and
    what comes out is their average to the last digits.

    Elsewhere: mergekit has this under the same name, with `nuslerp_flatten: false` for rows; its
    `nuslerp_row_wise: true` means columns here. It works on deltas where a base is given.

    Cost: columns need each matrix whole, with as much memory again as four float32 copies; the rest streams.

    >>> nuslerp(np.array([[1, 0], [0, 1]], np.float32), np.array([0.0, 2.0])).tolist()
    [0.0, 1.0]
    """
    total = total_weight(weights)
    t = 0.5 if abs(total) < 1e-6 else float(weights[1]) / total
    if tensors.ndim == 3:
        return _turn(tensors, np.repeat(_row_angles(tensors), tensors.shape[2]), t)
    if over == "row":
        return _turn(tensors, _angles_in_rows(tensors[:, None], {})[0, 0] if angles is None else angles[0], t)
    found = gram_of(tensors) if gram is None else gram
    return weighted_sum(tensors, arc(t, float(angles_of(found, _LEAST_NORM)), _FLAT))


def _turn(tensors: Floats, angles: Doubles, t: float) -> Floats:
    """Interpolate two tensors [2, ...] with an angle for each entry [m]."""
    merged = np.empty(tensors[0].size, np.float32)
    pair = floats(tensors).reshape(2, -1)
    kernels.arc_each(pair, np.ascontiguousarray(angles), t, _FLAT, merged)
    return merged.reshape(tensors.shape[1:])
