"""One model: TIES on adapters."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from mediator_cli.strategies._catalogue import ActOn, Density, Rank, Sign, fit_merge, merge_where
from mediator_cli.strategies._fitting import Scale, TuningRows
from mediator_cli.strategies.strategy import Fitted, strategy

if TYPE_CHECKING:
    from mediator_cli.strategies.bench import Bench


@strategy(group="merge", reference="https://arxiv.org/abs/2306.01708", needs=("rows",))
def merge_ties(
    bench: Bench,
    *,
    act_on: ActOn = "delta",
    density: Density = 0.2,
    sign: Sign = "total",
    rank: Rank = 0,
    scale: Scale = None,
    tuning_rows: TuningRows = 16,
) -> Fitted:
    """Keep each expert's largest entries, elect a sign for each entry, average those that agree with it.

    It is the catalogue's `lora_ties` with the weights 1. On deltas, which is what the paper does, the result is cut to
    a rank, and `facts` tell the share of energy that is left; it makes the dense deltas of one matrix at a time. On
    factors the entries of adapters that were trained apart have little to do with each other.
    """
    given = {"act_on": act_on, "density": density, "sign": sign}
    return fit_merge(bench, partial(merge_where, bench, "lora_ties", given, rank), 1.0, scale, tuning_rows)
