"""Average of the experts, drawn towards the base by the angle between their changes."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from mediator_cli.kernels.arrays import Doubles, Floats
from mediator_cli.methods._gram import gram_block, gram_of, norms_of, row_grams, square
from mediator_cli.methods._ops import floats, weighted_sum
from mediator_cli.methods.registry import merge_method
from mediator_cli.methods.statistics import Params, PerRow, Sum, over_tensor

_SINGULAR = 1e-6
"""A denominator so small means that the ratio has no value: the base stays."""


def _over_rows(params: Params) -> bool:
    return bool(params["over"] == "row")


def _over_tensors(params: Params) -> bool:
    return not _over_rows(params)


def _ratios(grams: Doubles, params: Params) -> Doubles:
    """Give the share of the experts' mean, from Gram matrices [..., n, n]; float64 [...]."""
    n = grams.shape[-1]
    norms = norms_of(grams)
    sizes = np.maximum(norms[..., :, None] * norms[..., None, :], params["least_norms"]) + params["eps"]
    cosines = np.divide(grams, sizes, out=np.zeros_like(grams), where=sizes > 0)
    pairs = np.clip(cosines[..., *np.triu_indices(n, 1)], -1.0, 1.0)
    cosine = pairs.mean(axis=-1) if params["mean_of"] == "cosines" else np.cos(np.arccos(pairs).mean(axis=-1))
    below = 1 + (n - 1) * cosine + params["eps"]
    ratios: Doubles = np.divide(n * cosine, below, out=np.zeros_like(cosine), where=np.abs(below) >= _SINGULAR)
    return ratios


def _ratios_in_rows(rows: Floats, params: Params) -> Doubles:
    return np.broadcast_to(_ratios(row_grams(rows), params)[None, :, None], rows.shape)


@merge_method(
    space="delta",
    reference="https://arxiv.org/abs/2403.19522",
    statistics=(Sum("gram", gram_block, over_tensor, _over_tensors, square),),
    rows=(PerRow("ratios", _ratios_in_rows, _over_rows),),
    presets={"mergekit": {"least_norms": 1e-6}, "fusion_bench": {"mean_of": "angles", "eps": 1e-8}},
    n_inputs=(2, None),
    uses_weights=False,
)
def model_stock(
    deltas: Floats,
    weights: Doubles,
    *,
    over: Annotated[
        Literal["tensor", "row"], Field(description="Find one angle for each tensor, or for each row of it.")
    ] = "tensor",
    mean_of: Annotated[
        Literal["cosines", "angles"], Field(description="What is averaged over the pairs of experts.")
    ] = "cosines",
    least_norms: Annotated[
        float, Field(ge=0, allow_inf_nan=False, description="Least product of two norms to divide by.")
    ] = 0.0,
    eps: Annotated[
        float, Field(ge=0, le=1e-3, description="Added to products of norms, and to the ratio's denominator.")
    ] = 0.0,
    gram: Doubles | None = None,
    ratios: Doubles | None = None,
) -> Floats:
    """Average the experts, and draw the average towards the base by the angle between their changes.

    W₀ + t · mean(τₜ) with t = N·cos θ / (1 + (N - 1)·cos θ) for N experts, θ the angle between two deltas; with more
    than two, cos θ is the mean over pairs. It is 0 for a delta of zeros. Where the denominator vanishes the base
    stays. Weights of the recipe have no say.

    Apt when the experts are runs of the same task: few of them then come close to the average of many.

    Not apt when the experts learned different tasks: their deltas are nearly at right angles, and t is near 0. Where
    they oppose each other t is negative.

    Elsewhere: the paper has one θ. For more than two experts mergekit averages cosines, as the default does, and
    fusion_bench angles. mergekit takes products of norms as 1e-6 at least, which leaves tiny deltas out.

    >>> model_stock(np.array([[2, 0], [2, 0]], np.float32), np.ones(2)).tolist()
    [2.0, 0.0]
    """
    params = {"mean_of": mean_of, "least_norms": least_norms, "eps": eps}
    n = len(deltas)
    if over == "tensor":
        ratio = float(_ratios(gram_of(deltas) if gram is None else gram, params))
        return weighted_sum(deltas, np.ones(n), n, ratio)
    found = _ratios_in_rows(deltas[:, None], params)[0] if ratios is None else ratios
    return weighted_sum(deltas, np.ones(n), n) * floats(found[0])
