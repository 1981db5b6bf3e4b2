"""E-WEMoE: as WEMoE, with one gate for all layers and less kept of each expert."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field

from mediator_cli.bundle.gates_record import GateRule
from mediator_cli.runtime.gates import Gate, Gates
from mediator_cli.strategies._learned import learn
from mediator_cli.strategies._mlp import mlp_places, split
from mediator_cli.strategies._svd import cut
from mediator_cli.strategies._train import BatchRows, Rate, Schedule, Steps
from mediator_cli.strategies.route_wemoe import Scale
from mediator_cli.strategies.strategy import Fitted, strategy

if TYPE_CHECKING:
    from mediator_cli.strategies.bench import Bench

Rank = Annotated[int, Field(ge=1, description="Singular values kept of each expert's change of a matrix of an MLP.")]


@strategy(group="route", reference="https://arxiv.org/abs/2410.21804", needs=("rows",))
def route_e_wemoe(
    bench: Bench,
    *,
    scale: Scale = None,
    rank: Rank = 4,
    steps: Steps = 40,
    rows: BatchRows = 8,
    rate: Rate = 3e-3,
) -> Fitted:
    """Learn WEMoE with one gate R·h̄ + c that all layers share, on experts cut to a rank.

    Of the paper: the shared gate, small experts, no rescaling. It keeps the largest tenth of all entries; entries of a
    low-rank change are not there to be dropped, so singular values are.
    """
    n_experts = len(bench.library.experts)
    weight = scale or 1 / n_experts
    places = mlp_places(bench)
    routed, elsewhere = split(bench, places, weight)
    small = {name: {n: cut(delta, rank) for n, delta in change.items()} for name, change in routed.items()}
    size = next(iter(places.values()))
    shared = Gate(torch.zeros(n_experts, 1, size), torch.full((n_experts,), weight))
    rule = GateRule(at="layer", per="sequence", weights="free")
    gates = Gates("e_wemoe", rule, bench.library.names, dict.fromkeys(places, shared))
    return learn(bench, gates, Schedule(steps, rows, rate), small, (elsewhere,))
