"""A learned router chooses experts once for a sequence, from its prompt."""

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

TopK = Annotated[int | None, Field(ge=1, description="Experts at once; null: all.")]
Start = Annotated[
    Literal["average_activation", "zeros"],
    Field(description="Begin from the average states of each expert's prompts, or without any preference."),
]
Reads = Annotated[
    Literal["normalised", "unit", "input"],
    Field(description="The hidden state with mean 0 and variance 1, scaled to length 1, or as it is."),
]


@strategy(group="route", reference="https://arxiv.org/abs/2603.03535", needs=("rows",))
def route_sequence(
    bench: Bench,
    *,
    at: AtParameter = "layer",
    top_k: TopK = 2,
    start: Start = "average_activation",
    reads: Reads = "normalised",
    steps: Steps = 40,
    rows: BatchRows = 8,
    rate: Rate = 1e-3,
) -> Fitted:
    """Learn W + Σ wₜ bₜaₜ with w = softmax of the top k of R·h̄, h̄ the mean over the prompt, R and a bias per place.

    The experts are frozen; -ln p of the validation answers of all tasks is what is lowered.
    """
    rule = GateRule(reads=reads, at=at, per="sequence", top_k=top_k)
    gates = Gates("sequence", rule, bench.library.names, start_gates(bench, rule, start))
    return learn(bench, gates, Schedule(steps, rows, rate))
