"""Drop and rescale, then average."""

from __future__ import annotations

from mediator_cli.kernels.arrays import Doubles, Floats
from mediator_cli.methods._ops import (
    KeepChance,
    Lambda,
    Normalize,
    Rescale,
    constant_chances,
    drop_and_rescale,
    l1_block,
    needs_l1,
    only_where_own,
    total_weight,
    two_norms,
    weighted_sum,
)
from mediator_cli.methods.registry import merge_method
from mediator_cli.methods.statistics import PerRow, Sum, over_tensor


@merge_method(
    space="delta",
    reference="https://arxiv.org/abs/2311.03099",
    statistics=(Sum("l1", l1_block, over_tensor, needs_l1, two_norms),),
    presets={
        "mergekit": {"density": 1.0, "rescale": "l1", "normalize": False},
        "fusion_bench": {"density": 0.5, "lambda": 0.3, "normalize": False},
        "mergeme": {"lambda": 1 / 3, "normalize": False},
    },
    random=True,
    rows=(PerRow("chances", constant_chances, only_where_own, where_own="density"),),
    per_expert=("density",),
    normalizes=lambda params: bool(params["normalize"]),
)
def dare_linear(
    deltas: Floats,
    weights: Doubles,
    *,
    density: KeepChance = 0.8,
    rescale: Rescale = "expected",
    lambda_: Lambda = 1.0,
    normalize: Normalize = True,
    uniforms: Floats,
    chances: Floats | None = None,
    l1: Doubles | None = None,
) -> Floats:
    """Drop entries of each delta at random, rescale the rest, then average: W₀ + λ · Σ wₜ·τ̂ₜ / Σ wₜ.

    τ̂ₜ = τₜ·m / density with m drawn 1 with probability `density`, which keeps the expectation.

    Apt when deltas are small and redundant, as after supervised fine-tuning.

    Not apt when deltas are large, as after continued pre-training: what is dropped is then missed, and the noise of
    rescaling is large.

    Elsewhere: defaults follow the authors' command for language models: 20 % dropped, rescaled, averaged. mergekit
    rescales to the L1 norm that the delta had before; fusion_bench drops half and sums. MergeME sums with
    λ = 1/3, for all that the experts of a mixture share.

    >>> import numpy as np
    >>> half = np.array([[0.1, 0.9]], np.float32)
    >>> dare_linear(np.ones((1, 2), np.float32), np.ones(1), density=0.5, uniforms=half).tolist()
    [2.0, 0.0]
    """
    kept = drop_and_rescale(deltas, uniforms, density if chances is None else chances, rescale, l1)
    return weighted_sum(kept, weights, total_weight(weights) if normalize else 1.0, lambda_)
