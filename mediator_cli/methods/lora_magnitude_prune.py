"""Keep the largest entries of what adapters have, and sum them."""

from __future__ import annotations

from collections.abc import Sequence

from mediator_cli.kernels.arrays import Doubles, Floats
from mediator_cli.kernels.factors import Factors
from mediator_cli.methods._factors import ActOn, Energy, Rank, Share, add_up, keep_largest, merge_each, takes_no_rank
from mediator_cli.methods.registry import merge_method
from mediator_cli.methods.statistics import Factor


@merge_method(
    space="adapter",
    reference="https://huggingface.co/docs/peft/developer_guides/model_merging",
    check=takes_no_rank,
)
def lora_magnitude_prune(
    adapters: Sequence[Factors],
    weights: Doubles,
    *,
    act_on: ActOn = "factors",
    density: Share = 0.5,
    rank: Rank = 0,
    energy: Energy = 1.0,
) -> Factors:
    """Keep the largest entries of each adapter and sum them.

    Of each matrix exactly int(n·density) entries stay, of equal magnitudes the first. On factors, A and B are summed by
    themselves and carry √(wₜsₜ) each, with sₜ the scaling of an adapter; `act_on: delta` sums the pruned deltas and
    cuts the sum to `rank`.

    Apt when small entries are noise and the adapters change different entries.

    Not apt when adapters contradict each other; `lora_ties` elects signs too.

    Elsewhere: PEFT's combination_types `magnitude_prune` and, with `act_on: delta`, `magnitude_prune_svd`; PEFT has no
    default density.

    Cost: `act_on: delta` takes one singular value decomposition of each dense matrix, and n of them in memory.

    >>> import numpy as np
    >>> one = Factors(np.array([[4, 1]], np.float32), np.array([[1]], np.float32))
    >>> lora_magnitude_prune([one, one], np.ones(2), density=0.5).a.tolist()
    [[8.0, 0.0]]
    """

    def prune(n: int, which: Factor, values: Floats) -> Doubles:
        return keep_largest(values, density)

    return merge_each(adapters, weights, act_on, prune, add_up, (rank, energy))
