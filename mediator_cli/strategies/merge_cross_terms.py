"""One model: A's and B's averaged apart."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from mediator_cli.strategies._catalogue import fit_merge, merge_factors
from mediator_cli.strategies._fitting import Scale, TuningRows, names_of
from mediator_cli.strategies.strategy import Fitted, strategy

if TYPE_CHECKING:
    from mediator_cli.strategies.bench import Bench


@strategy(group="merge", reference="https://arxiv.org/abs/2603.03535", needs=("rows",))
def merge_cross_terms(bench: Bench, *, scale: Scale = None, tuning_rows: TuningRows = 16) -> Fitted:
    """Average A and B of all experts apart: W + scale · (Σ √sₜ bₜ / T)·(Σ √sₜ aₜ / T), sₜ the adapters' scalings.

    The product has cross terms bₜ·aᵤ, so it is not the average of the changes; its rank is the largest of the adapters.
    Adapters of lower ranks are filled up with zeros. It is the catalogue's `lora_linear` with the weights 1 / T².
    """
    merge = partial(merge_factors, bench, "lora_linear", {})
    return fit_merge(bench, merge, len(names_of(bench)) ** -2.0, scale, tuning_rows)
