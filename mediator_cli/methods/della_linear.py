"""Drop by rank and rescale, then average."""

from __future__ import annotations

from mediator_cli.kernels.arrays import Doubles, Floats
from mediator_cli.methods._ops import (
    KeepChance,
    Lambda,
    Normalize,
    Rescale,
    drop_and_rescale,
    l1_block,
    needs_l1,
    total_weight,
    two_norms,
    weighted_sum,
)
from mediator_cli.methods._ranks import Epsilon, check_chances, drops_some, rank_chances, ranked_chances
from mediator_cli.methods.registry import merge_method
from mediator_cli.methods.statistics import PerRow, Sum, over_tensor


@merge_method(
    space="delta",
    reference="https://arxiv.org/abs/2406.11617",
    statistics=(Sum("l1", l1_block, over_tensor, needs_l1, two_norms),),
    rows=(PerRow("chances", rank_chances, drops_some),),
    presets={
        "mergekit": {"density": 1.0, "epsilon": 0.15, "rescale": "l1", "lambda": 1.0, "normalize": False},
    },
    random=True,
    per_expert=("density", "epsilon"),
    normalizes=lambda params: bool(params["normalize"]),
    check=check_chances,
)
def della_linear(
    deltas: Floats,
    weights: Doubles,
    *,
    density: KeepChance = 0.7,
    epsilon: Epsilon = 0.07,
    rescale: Rescale = "expected",
    lambda_: Lambda = 1.1,
    normalize: Normalize = True,
    uniforms: Floats,
    chances: Floats | None = None,
    l1: Doubles | None = None,
) -> Floats:
    """Drop entries at random, small ones more often, rescale the rest, then average.

    As `della` without the election of signs: W₀ + λ · Σ wₜ·τ̂ₜ / Σ wₜ with τ̂ₜ = τₜ·m / p, m drawn 1 with the chance p
    of the entry.

    Apt when experts agree in sign, and large changes matter more than small ones.

    Not apt when experts disagree in sign: `della` elects one.

    Elsewhere: defaults follow the authors' example; mergekit restores the L1 norm and does not normalise (preset).

    >>> import numpy as np
    >>> deltas, drawn = np.array([[2, 5, -1]], np.float32), np.array([[0.6, 0.6, 0.6]], np.float32)
    >>> della_linear(deltas, np.ones(1), density=0.5, epsilon=0.125, lambda_=1.0, uniforms=drawn).tolist()
    [0.0, 8.0, 0.0]
    """
    kept = drop_and_rescale(deltas, uniforms, ranked_chances(deltas, density, epsilon, chances), rescale, l1)
    return weighted_sum(kept, weights, total_weight(weights) if normalize else 1.0, lambda_)
