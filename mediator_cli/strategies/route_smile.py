"""SMILE: experts cut by singular value decomposition, chosen per token by how much of it lies in their input space."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field

from mediator_cli.bundle.gates_record import GateRule
from mediator_cli.runtime.gates import Gate, Gates
from mediator_cli.strategies._gates import places_of
from mediator_cli.strategies._svd import cut, right_vectors
from mediator_cli.strategies.strategy import Fitted, strategy

if TYPE_CHECKING:
    from mediator_cli.strategies.bench import Bench

Rank = Annotated[int, Field(ge=1, description="Singular values that are kept of each expert's change of a matrix.")]
GateRank = Annotated[int, Field(ge=1, description="Right singular vectors that the gate measures an input by.")]
TopK = Annotated[int | None, Field(ge=1, description="Experts of one token; null: all.")]


@strategy(group="route", reference="https://arxiv.org/abs/2408.10174")
def route_smile(bench: Bench, *, rank: Rank = 16, gate_rank: GateRank = 4, top_k: TopK = 1) -> Fitted:
    """Weigh experts per matrix and token by ‖Vₜᵀh‖, Vₜ the first right singular vectors; experts cut to a rank.

    Softmax is over the chosen alone, so that with top_k 1 the weight is 1. The paper cuts full fine-tunes; adapters of
    at most that rank stay whole.
    """
    library = bench.library
    gates = {
        name: Gate(torch.stack([right_vectors(own.get(name), gate_rank, size) for own in library.experts.values()]),
                   torch.zeros(len(library.experts)))
        for name, size in places_of(bench, "module").items()
    }  # fmt: skip
    kept = {
        expert: {name: cut(delta, rank) for name, delta in change.items()} for expert, change in library.experts.items()
    }
    rule = GateRule(score="length", top_k=top_k)
    return Fitted(experts=kept, decision=Gates("smile", rule, library.names, gates))
