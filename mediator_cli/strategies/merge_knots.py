"""One model: KnOTS on adapters."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from mediator_cli.strategies._catalogue import Density, fit_merge, merge_in_outputs
from mediator_cli.strategies._fitting import Scale, TuningRows
from mediator_cli.strategies.strategy import Fitted, strategy

if TYPE_CHECKING:
    from mediator_cli.strategies.bench import Bench


@strategy(group="merge", reference="https://arxiv.org/abs/2410.19735", needs=("rows",))
def merge_knots(bench: Bench, *, density: Density = 1.0, scale: Scale = None, tuning_rows: TuningRows = 16) -> Fitted:
    """Express all experts of a matrix in common directions of its outputs, merge what is left by TIES, go back.

    It is the catalogue's `knots` with the weights 1 and `lambda: 1`, trimmed matrix by matrix (`trim: tensor`). As its
    directions lie in what all bₜ span, the result's rank is at most the sum of the ranks, and nothing is cut.
    """
    given = {"density": density, "lambda": 1.0, "trim": "tensor"}
    return fit_merge(bench, partial(merge_in_outputs, bench, "knots", given), 1.0, scale, tuning_rows)
