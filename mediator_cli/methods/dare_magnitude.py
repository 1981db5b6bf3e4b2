"""Drop the smallest changes, rescale the rest, then average."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from mediator_cli.kernels.arrays import Doubles, Floats
from mediator_cli.methods import _kernels
from mediator_cli.methods._ops import Lambda, Normalize, floats, kth_magnitudes, total_weight, weighted_sum
from mediator_cli.methods.registry import merge_method
from mediator_cli.methods.statistics import Params, Select, over_tensor


def _rank_of_largest_dropped(params: Params, n: int) -> int:
    """Give the rank, 1 for the largest of n, of the largest entry that is dropped; n + 1 where none is."""
    # Rounded, so that a share such as 1 - 0.9 counts as the 0.1 that it stands for.
    return n - int(n * round(1 - params["density"], 12)) + 1


def _drops_some(params: Params) -> bool:
    return bool(params["density"] < 1)


@merge_method(
    space="delta",
    reference="https://arxiv.org/abs/2311.03099",
    statistics=(Select("largest_dropped", _rank_of_largest_dropped, over_tensor, _drops_some, smallest=True),),
    normalizes=lambda params: bool(params["normalize"]),
)
def dare_magnitude(
    deltas: Floats,
    weights: Doubles,
    *,
    density: Annotated[float, Field(gt=0, le=1, description="Share of entries that stay.")] = 0.8,
    rescale: Annotated[bool, Field(description="Divide what stays by density.")] = True,
    lambda_: Lambda = 1.0,
    normalize: Normalize = True,
    largest_dropped: Floats | None = None,
) -> Floats:
    """Drop the smallest entries of each delta, rescale the rest, then average: W₀ + λ · Σ wₜ·τ̂ₜ / Σ wₜ.

    τ̂ₜ = τₜ / density where |τₜ| is above the int(n·(1 - density))-th smallest of the tensor's n entries, else 0. All
    entries that equal that one are dropped, so a few more than the share may be.

    Apt when it is to be compared with `dare_linear`, which drops at random: the authors did so, and found this worse
    once more than half is dropped.

    Not apt when little stays: the largest entries hold more than their share of a delta, so dividing by density
    overshoots. `rescale: false` then is the safer choice.

    >>> dare_magnitude(np.array([[1, -4, 2, 3]], np.float32), np.ones(1), density=0.5).tolist()
    [0.0, -8.0, 0.0, 6.0]
    """
    kept = deltas
    if density < 1:
        rank = _rank_of_largest_dropped({"density": density}, deltas.shape[1])
        limits = kth_magnitudes(deltas, rank, smallest=True) if largest_dropped is None else largest_dropped
        kept = np.empty(deltas.shape, np.float32)
        above = np.nextafter(floats(limits), np.float32(np.inf))
        _kernels.keep_between(floats(deltas), above, np.full(len(deltas), np.inf, np.float32), kept)
    divisor = (density if rescale else 1.0) * (total_weight(weights) if normalize else 1.0)
    return weighted_sum(kept, weights, divisor, lambda_)
