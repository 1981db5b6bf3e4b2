"""Average what several experts changed, and boost what one alone did."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from mediator_cli.kernels.arrays import Doubles, Floats
from mediator_cli.methods._shared_changes import Epsilon, count_shared, merge_shared
from mediator_cli.methods.registry import merge_method
from mediator_cli.methods.statistics import Slab, Sum, always, over_tensor


def _counts(slab: Slab) -> Doubles:
    return count_shared(slab.inputs, slab.params["epsilon"])


def _boosts(counts: Doubles, r: float, alpha: float) -> Doubles:
    """Give each expert's factor on what it alone changed, from counts [2, n] of shared and unique entries."""
    shared, unique = counts
    overlap = np.divide(shared, unique, out=np.where(shared > 0, alpha, 0.0), where=unique > 0)
    boosts: Doubles = 1 + r * np.minimum(overlap, alpha)
    return boosts


@merge_method(
    space="delta",
    reference="https://arxiv.org/abs/2601.13572",
    statistics=(Sum("counts", _counts, over_tensor, always, lambda n: (2, n)),),
)
def ramplus_tl(
    deltas: Floats,
    weights: Doubles,
    *,
    r: Annotated[float, Field(ge=0, allow_inf_nan=False, description="Boost for each unit of overlap.")] = 0.1,
    alpha: Annotated[float, Field(ge=0, allow_inf_nan=False, description="Most overlap that counts.")] = 0.2,
    epsilon: Epsilon = 1e-5,
    counts: Doubles | None = None,
) -> Floats:
    """Average what several experts changed, and boost what one alone did by how much it shares.

    As `ram`, with entries that expert t alone changed multiplied by 1 + r·min(ρₜ, α). ρₜ = how many of its changed
    entries of the tensor others changed too, divided by how many they did not: what averaging takes from an expert is
    given back where it does not disturb the others.

    Apt when experts were trained by reinforcement and overlap in part.

    Not apt when deltas are dense; see `ram`.

    Elsewhere: the authors count over the whole model; this is mergekit's variant, which counts per tensor.

    >>> merged = ramplus_tl(np.array([[4, 2, 0], [2, 0, 6]], np.float32), np.ones(2), r=0.5, alpha=2.0)
    >>> merged.tolist()
    [3.0, 3.0, 9.0]
    """
    found = count_shared(deltas, epsilon) if counts is None else counts
    return merge_shared(deltas, weights, epsilon, _boosts(found, r, alpha))
