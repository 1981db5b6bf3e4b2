"""SMEAR: a sequence's experts are merged into one by weights that a learned router makes of its mean state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from mediator_cli.bundle.gates_record import GateRule
from mediator_cli.runtime.gates import Gates
from mediator_cli.strategies._gates import AtParameter
from mediator_cli.strategies._learned import learn, start_gates
from mediator_cli.strategies._train import BatchRows, Rate, Schedule, Steps
from mediator_cli.strategies.strategy import Fitted, strategy

if TYPE_CHECKING:
    from mediator_cli.strategies.bench import Bench

Start = Annotated[
    Literal["zeros", "average_activation"],
    Field(description="Begin without any preference, or from the average states of each expert's prompts."),
]


@strategy(group="route", reference="https://arxiv.org/abs/2306.03745", needs=("rows",))
def route_smear(
    bench: Bench,
    *,
    at: AtParameter = "layer",
    start: Start = "zeros",
    steps: Steps = 50,
    rows: BatchRows = 8,
    rate: Rate = 3e-3,
) -> Fitted:
    """Learn W + Σ wₜ bₜaₜ with w = softmax over all experts of R·LN(h̄), h̄ the mean over the prompt.

    The paper learns experts and router together and drops experts at random; here the experts are given and frozen.
    """
    rule = GateRule(reads="normalised", at=at, per="sequence")
    gates = Gates("smear", rule, bench.library.names, start_gates(bench, rule, start))
    return learn(bench, gates, Schedule(steps, rows, rate))
