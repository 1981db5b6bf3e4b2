"""One model: RobustMerge on adapters."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from mediator_cli.strategies._catalogue import Density, fit_merge, merge_factors
from mediator_cli.strategies._fitting import Scale, TuningRows, names_of
from mediator_cli.strategies.strategy import Fitted, strategy

if TYPE_CHECKING:
    from mediator_cli.strategies.bench import Bench


@strategy(group="merge", reference="https://arxiv.org/abs/2502.17159", needs=("rows",))
def merge_robust(bench: Bench, *, density: Density = 0.2, scale: Scale = None, tuning_rows: TuningRows = 16) -> Fitted:
    """Prune each expert's factors by magnitude, make up in B for what A lost rank by rank, sum A's, average B's.

    It is the catalogue's `robustmerge` with `fuse_weight: 1` and the weights 1 / T, for A is a sum: equal experts of
    density 1 give that expert.
    """
    given = {"density": density, "fuse_weight": 1.0}
    merge = partial(merge_factors, bench, "robustmerge", given)
    return fit_merge(bench, merge, 1 / len(names_of(bench)), scale, tuning_rows)
