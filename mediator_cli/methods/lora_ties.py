"""Trim, elect sign and merge what adapters have: their factors or their deltas."""

from __future__ import annotations

from collections.abc import Sequence

from mediator_cli.kernels.arrays import Doubles, Floats
from mediator_cli.kernels.factors import Factors
from mediator_cli.methods._factors import (
    ActOn,
    Energy,
    Rank,
    Share,
    Sign,
    agree,
    keep_largest,
    merge_each,
    takes_no_rank,
)
from mediator_cli.methods.registry import merge_method
from mediator_cli.methods.statistics import Factor


@merge_method(space="adapter", reference="https://arxiv.org/abs/2306.01708", check=takes_no_rank)
def lora_ties(
    adapters: Sequence[Factors],
    weights: Doubles,
    *,
    act_on: ActOn = "factors",
    density: Share = 0.2,
    sign: Sign = "total",
    rank: Rank = 0,
    energy: Energy = 1.0,
) -> Factors:
    """Trim adapters to their largest entries, elect a sign for each entry, average what agrees with it.

    Of each matrix exactly int(n·density) entries stay. Signs are elected before weights are applied; the mean divides
    by the number of entries that agree. On factors, A and B carry √(wₜsₜ) each, with sₜ the scaling of an adapter.

    Apt when adapters change the same entries in opposite directions; `act_on: delta` for adapters that were trained by
    themselves, whose factors have no common order.

    Not apt when adapters agree, where it only takes entries away. `act_on: delta` makes the dense delta of one matrix
    at a time, and cuts what is left of it to `rank`.

    Elsewhere: PEFT's combination_types `ties` and, with `act_on: delta`, `ties_svd`; PEFT has no default density, the
    0.2 is that of the paper. `ties` merges adapters into a full model, with the paper's rules.

    Cost: `act_on: delta` takes one singular value decomposition of each dense matrix, and n of them in memory.

    >>> import numpy as np
    >>> one = Factors(np.array([[4, 1]], np.float32), np.array([[1]], np.float32))
    >>> two = Factors(np.array([[-2, 3]], np.float32), np.array([[1]], np.float32))
    >>> lora_ties([one, two], np.ones(2), density=1.0).a.tolist()
    [[4.0, 2.0]]
    """

    def prune(n: int, which: Factor, values: Floats) -> Doubles:
        return keep_largest(values, density)

    return merge_each(adapters, weights, act_on, prune, agree(sign), (rank, energy))
