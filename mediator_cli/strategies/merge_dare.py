"""One model: DARE on adapters."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from mediator_cli.strategies._catalogue import ActOn, Density, Rank, fit_merge, merge_where
from mediator_cli.strategies._fitting import Scale, TuningRows, names_of
from mediator_cli.strategies.strategy import Fitted, strategy

if TYPE_CHECKING:
    from mediator_cli.strategies.bench import Bench

Combine = Annotated[
    Literal["ties", "linear"], Field(description="What follows: elect signs and average what agrees, or average all.")
]


@strategy(group="merge", reference="https://arxiv.org/abs/2311.03099", needs=("rows",))
def merge_dare(
    bench: Bench,
    *,
    combine: Combine = "ties",
    act_on: ActOn = "delta",
    density: Density = 0.8,
    rank: Rank = 0,
    scale: Scale = None,
    tuning_rows: TuningRows = 16,
) -> Fitted:
    """Drop entries of each expert at random, divide the others by the share that stays, then combine.

    It is the catalogue's `lora_dare_ties` with the weights 1, or `lora_dare_linear` with 1 / T; on factors, which carry
    the root of a weight, with 1 / T². The bench's seed draws the same numbers as a recipe with that seed. On deltas the
    result is cut to `rank`, and `facts` tell the share of energy that is left.
    """
    given = {"act_on": act_on, "density": density}
    power = 0 if combine == "ties" else (2 if act_on == "factors" else 1)
    merge = partial(merge_where, bench, f"lora_dare_{combine}", given, rank)
    return fit_merge(bench, merge, float(len(names_of(bench))) ** -power, scale, tuning_rows)
