"""WEMoE: attention is merged once, the MLP of each layer is merged anew for every sequence by a learned gate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field

from mediator_cli.bundle.gates_record import GateRule
from mediator_cli.runtime.gates import Gate, Gates
from mediator_cli.strategies._learned import learn
from mediator_cli.strategies._mlp import mlp_places, split
from mediator_cli.strategies._train import BatchRows, Rate, Schedule, Steps
from mediator_cli.strategies.strategy import Fitted, strategy

if TYPE_CHECKING:
    from mediator_cli.strategies.bench import Bench

Scale = Annotated[
    float | None, Field(gt=0, description="λ: weight of each expert to begin with; null: one by their number.")
]


@strategy(group="route", reference="https://arxiv.org/abs/2402.00433", needs=("rows",))
def route_wemoe(
    bench: Bench, *, scale: Scale = None, steps: Steps = 40, rows: BatchRows = 8, rate: Rate = 3e-3
) -> Fitted:
    """Learn W + Σ wₜτₜ in each MLP, with w = R·h̄ + c free of softmax, h̄ the mean over the prompt; W + λΣτₜ elsewhere.

    c begins with λ (0.3 in the paper, for eight tasks) and R with zeros, so that step 0 is task arithmetic. The paper's
    gate for one layer of R; it lowers the entropy of test outputs, here -ln p of validation answers is lowered.
    """
    n_experts = len(bench.library.experts)
    weight = scale or 1 / n_experts
    places = mlp_places(bench)
    routed, elsewhere = split(bench, places, weight)
    start = {
        place: Gate(torch.zeros(n_experts, 1, size), torch.full((n_experts,), weight)) for place, size in places.items()
    }
    rule = GateRule(at="layer", per="sequence", weights="free")
    gates = Gates("wemoe", rule, bench.library.names, start)
    return learn(bench, gates, Schedule(steps, rows, rate), routed, (elsewhere,))
