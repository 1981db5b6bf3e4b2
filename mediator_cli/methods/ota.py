"""Average by curvature, as the second moments of Adam tell it."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from mediator_cli.kernels.arrays import Doubles, Flags, Floats
from mediator_cli.methods._kernels_scores import by_curvature
from mediator_cli.methods._ops import floats, kth_magnitudes
from mediator_cli.methods.registry import merge_method
from mediator_cli.methods.statistics import Over, Params, Select, Slab, Statistics


def _saliency(deltas: Floats, moments: Floats, by_delta: bool) -> Floats:
    """Give √v·|τ|, or √v, of each entry [n, m]: ranks like v·τ² and does not underflow."""
    root = np.sqrt(moments)
    return root * np.abs(deltas) if by_delta else root


def _saliency_of(slab: Slab) -> Floats:
    return _saliency(slab.inputs, _given(slab.inputs, slab.statistics), slab.params["saliency"] == "delta")


def _given(deltas: Floats, statistics: Statistics) -> Floats:
    """Give the second moments [n, m] of deltas; ones where there are none."""
    return floats(statistics["moments"]) if "moments" in statistics else np.ones_like(deltas, np.float32)


def _kept_count(params: Params, n: int) -> int:
    return max(1, int(n * params["density"]))


def _drops_some(params: Params) -> bool:
    return bool(params["density"] < 1)


def _over_model(params: Params) -> Over:
    return "model"


@merge_method(
    space="delta",
    reference="https://arxiv.org/abs/2509.11167",
    statistics=(Select("limits", _kept_count, _over_model, _drops_some, of=_saliency_of),),
    presets={"ota_merge": {"epsilon": 1e-8}},
    identity_at_one=True,
    needs_moments=True,
)
def ota(
    deltas: Floats,
    weights: Doubles,
    *,
    power: Annotated[
        float, Field(gt=0, allow_inf_nan=False, description="Entries weigh v to this power; 0.5 is Adam's own step.")
    ] = 0.5,
    epsilon: Annotated[
        float, Field(gt=0, allow_inf_nan=False, description="Added to each weight; far below the usual √v of 1e-10.")
    ] = 1e-26,
    threshold: Annotated[
        float, Field(ge=0, allow_inf_nan=False, description="Entries of less saliency take no part; 0 drops none.")
    ] = 0.0,
    density: Annotated[
        float, Field(gt=0, le=1, description="Share of each expert's entries over the model that take part.")
    ] = 1.0,
    saliency: Annotated[
        Literal["delta", "moment"], Field(description="What decides which entries take part: v·τ², or v alone.")
    ] = "delta",
    fallback: Annotated[
        Literal["mean", "base"], Field(description="Where no expert takes part: the mean of all, or the base.")
    ] = "mean",
    moments: Floats | None = None,
    limits: Floats | None = None,
) -> Floats:
    """Average the experts by the curvature that their optimizer saw: W₀ + Σ Pₜ·mₜ·τₜ / Σ Pₜ·mₜ.

    Pₜ = wₜ·vₜ^power + ε with vₜ Adam's second moments (exp_avg_sq) of expert t; mₜ = 1 where its saliency v·τ² is at
    least `threshold` and among the largest share `density` of the expert's entries over the model.

    Apt when the optimizer states of all experts were kept: name their second moments in the recipe, as
    `second_moments` of each expert. Of entries on which one expert's loss depends and no other's, that expert decides.

    Not apt when experts were trained on very different scales of loss or with very different batches: their moments
    compare badly; weights of the recipe can make up for that.

    Elsewhere: the authors' code without a base decides by v alone (`saliency: moment`); that its mean is of weights
    instead of deltas changes nothing. It falls back also where Σ P is below 1.1·n·ε, which is most of a model with its
    own default of ε (preset `ota_merge`); its recipes set 1e-26, as here. `density` is instead of a threshold that has
    to be found for each expert. Its low-rank forms of v are not here.

    >>> tau, v = np.array([[2, 2], [6, 6]], np.float32), np.array([[9, 0], [1, 1]], np.float32)
    >>> ota(tau, np.ones(2), moments=v).tolist()
    [3.0, 6.0]
    """
    second = _given(deltas, {} if moments is None else {"moments": moments})
    marks = _marks(floats(deltas), second, saliency == "delta", threshold)
    if density < 1:
        scores = _saliency(deltas, second, saliency == "delta")
        found = kth_magnitudes(scores, _kept_count({"density": density}, deltas.shape[1])) if limits is None else limits
        marks &= scores >= found[:, None]
    merged = np.empty(deltas.shape[1], np.float32)
    given = floats(deltas), second, marks, weights
    by_curvature(*given, power, epsilon, fallback == "mean", merged)
    return merged


def _marks(deltas: Floats, moments: Floats, by_delta: bool, threshold: float) -> Flags:
    """Mark the entries of deltas [n, m] whose saliency reaches a threshold, exactly in float64; all for zero."""
    if threshold == 0:
        return np.ones(deltas.shape, np.bool_)
    scores = moments.astype(np.float64)
    if by_delta:
        scores *= deltas.astype(np.float64) ** 2
    marks: Flags = scores >= threshold
    return marks
