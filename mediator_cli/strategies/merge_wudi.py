"""One model: WUDI on adapters."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from mediator_cli.strategies._catalogue import fit_merge, merge_in_core
from mediator_cli.strategies._fitting import Scale, TuningRows, names_of
from mediator_cli.strategies.strategy import Fitted, strategy

if TYPE_CHECKING:
    from mediator_cli.strategies.bench import Bench

Solve = Annotated[
    Literal["adam", "exact"], Field(description="Take steps of Adam from the sum, or go to the minimum itself.")
]
Steps = Annotated[int, Field(ge=1, description="adam: how many steps.")]
Rate = Annotated[
    float,
    Field(gt=0, allow_inf_nan=False, description="adam: about how far an entry moves in a step, in the deltas' size."),
]


@strategy(group="merge", reference="https://arxiv.org/abs/2503.08099", needs=("rows",))
def merge_wudi(
    bench: Bench,
    *,
    solve: Solve = "adam",
    steps: Steps = 300,
    learning_rate: Rate = 0.01,
    scale: Scale = None,
    tuning_rows: TuningRows = 16,
) -> Fitted:
    """Change the sum of all experts until it differs little from each where that expert's inputs lie.

    For each matrix M / T where M minimises Σ ‖(M - τₜ)·τₜᵀ‖² / ‖τₜ‖², τₜ = bₜaₜ, or has taken some steps towards that
    from the sum. It is the catalogue's `wudi` with the weights 1 / T, in bases of all adapters' outputs and inputs,
    where no rank is lost: the minimum is the same there, the steps are others than on dense deltas and cost far less.
    `exact` makes much of inputs that several experts share, and may be many times as large as their sum.
    """
    given = {"solve": solve, "iterations": steps, "learning_rate": learning_rate, "unit": "rms"}
    merge = partial(merge_in_core, bench, "wudi", given)
    return fit_merge(bench, merge, 1 / len(names_of(bench)), scale, tuning_rows)
