"""Take what an expert changed little, and a step towards it elsewhere."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from mediator_cli.kernels.arrays import Doubles, Floats
from mediator_cli.methods.registry import merge_method


@merge_method(
    space="delta",
    reference="https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    n_inputs=(1, 1),
    uses_weights=False,
)
def nearswap(
    deltas: Floats,
    weights: Doubles,
    *,
    t: Annotated[float, Field(ge=0, allow_inf_nan=False, description="The longest step of an entry.")] = 0.0001,
) -> Floats:
    """Move each entry of the base towards the expert, but no further than t.

    W₀ + min(1, t / |τ|)·τ: entries that differ by up to t are swapped for the expert's, all others move by t. The
    weight of the recipe has no say.

    Apt when a strong base shall take on something of an expert with little risk to what it can do.

    Not apt when the expert's skill lies in large changes of few entries: these are cut most.

    Elsewhere: the author and mergekit write it as an interpolation with a weight for each entry, which is the same.
    The default is that of the author's model.

    >>> nearswap(np.array([[0.25, -2.0, 0.0]], np.float32), np.ones(1), t=0.5).tolist()
    [0.25, -0.5, 0.0]
    """
    moved: Floats = np.clip(deltas[0], np.float32(-t), np.float32(t))
    return moved
