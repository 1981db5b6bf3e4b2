"""Drop entries of what adapters have at random, rescale the rest, and sum."""

from __future__ import annotations

from collections.abc import Sequence

from mediator_cli.kernels.arrays import Doubles, Floats
from mediator_cli.kernels.factors import Factors
from mediator_cli.methods._factors import ActOn, Energy, Rank, add_up, keep_at_random, merge_each, takes_no_rank
from mediator_cli.methods._ops import KeepChance
from mediator_cli.methods.registry import merge_method
from mediator_cli.methods.statistics import Factor, Uniforms


@merge_method(space="adapter", reference="https://arxiv.org/abs/2311.03099", random=True, check=takes_no_rank)
def lora_dare_linear(
    adapters: Sequence[Factors],
    weights: Doubles,
    *,
    act_on: ActOn = "factors",
    density: KeepChance = 0.8,
    rank: Rank = 0,
    energy: Energy = 1.0,
    uniforms: Uniforms,
) -> Factors:
    """Drop entries of each adapter at random, divide the rest by the density, and sum.

    Each entry stays with the chance `density`, which keeps the expectation of each factor. On factors, A and B are
    summed by themselves and carry √(wₜsₜ) each, with sₜ the scaling of an adapter; `act_on: delta` drops entries of the
    deltas, sums them, and cuts the sum to `rank`.

    Apt when adapters are redundant enough to lose entries and their factors mean the same; else with `act_on: delta`.

    Not apt when ranks are small: a factor of few rows has nothing to spare.

    Elsewhere: PEFT's combination_types `dare_linear` and, with `act_on: delta`, `dare_linear_svd`; PEFT has no default
    density, 0.8 is that of the authors of DARE for language models.

    Cost: `act_on: delta` takes one singular value decomposition of each dense matrix, and n of them in memory.

    >>> import numpy as np
    >>> one = Factors(np.array([[4, 1]], np.float32), np.array([[1]], np.float32))
    >>> keep_all = lambda n, which, shape: np.zeros(shape, np.float32)
    >>> lora_dare_linear([one, one], np.ones(2), density=0.5, uniforms=keep_all).a.tolist()
    [[16.0, 4.0]]
    """

    def prune(n: int, which: Factor, values: Floats) -> Doubles:
        return keep_at_random(values, uniforms(n, which, values.shape), density)

    return merge_each(adapters, weights, act_on, prune, add_up, (rank, energy))
