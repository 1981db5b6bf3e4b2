"""Keep what several experts use, add it."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from mediator_cli.kernels.arrays import Doubles, Floats
from mediator_cli.methods._kernels_scores import add_used
from mediator_cli.methods._ops import Lambda, floats
from mediator_cli.methods.registry import merge_method


@merge_method(
    space="delta",
    reference="https://arxiv.org/abs/2405.07813",
    presets={"mergebench": {"tall_lambda": 0.2, "k": 2, "lambda": 0.4}},
)
def consensus(
    deltas: Floats,
    weights: Doubles,
    *,
    k: Annotated[int, Field(ge=0, description="Experts that have to use an entry for it to be kept.")] = 2,
    tall_lambda: Annotated[
        float,
        Field(ge=0, allow_inf_nan=False, description="An expert uses an entry where |τ| > this · |sum of all - τ|."),
    ] = 0.4,
    lambda_: Lambda = 0.4,
) -> Floats:
    """Add the deltas, but only the entries that at least k experts use: W₀ + λ · τ · [c ≥ k].

    τ = Σ wₜ·τₜ; expert t uses an entry where |wₜ·τₜ| > `tall_lambda` · |τ - wₜ·τₜ| (its TALL mask); c counts the
    experts that do. k = 2 removes what nobody uses and what one expert alone does; k = 1 only the former; with k above
    the number of experts nothing is left but the base. An unchanged entry is used by nobody.

    Apt when many experts of different tasks are added: what serves one task alone hurts the others. The defaults
    need no data: the authors choose `tall_lambda` from 0.2 to 0.6 and λ from 0.1 to 1 by accuracy.

    Not apt when there are two experts and each must keep its own skill: k = 2 keeps little of either.

    Elsewhere: preset `mergebench` has that benchmark's numbers for language models. fusion_bench's task_arithmetic with
    tall masks is handed deltas where it expects weights, so it makes other masks.

    >>> consensus(np.array([[2, 4, 1], [2, 0, -1]], np.float32), np.ones(2), lambda_=0.5).tolist()
    [2.0, 0.0, 0.0]
    """
    merged = np.empty(deltas.shape[1], np.float32)
    add_used(floats(deltas), floats(weights), np.float32(tall_lambda), k, np.float32(lambda_), merged)
    return merged
