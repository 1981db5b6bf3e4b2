"""Arrow: each token asks the expert whose strongest input direction it lies along; nothing is learned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field

from mediator_cli.bundle.gates_record import GateRule
from mediator_cli.runtime.gates import Gate, Gates
from mediator_cli.strategies._gates import places_of
from mediator_cli.strategies._svd import right_vectors
from mediator_cli.strategies.strategy import Fitted, strategy

if TYPE_CHECKING:
    from mediator_cli.strategies.bench import Bench

TopK = Annotated[int | None, Field(ge=1, description="Experts of one token; null: all.")]
Temperature = Annotated[float, Field(gt=0, description="Divides the scores before softmax.")]
Reads = Annotated[
    Literal["input", "unit", "normalised"],
    Field(description="The hidden state as it is (paper), its direction alone (cosines), or layer-normed."),
]


@strategy(group="route", reference="https://arxiv.org/abs/2405.11157")
def route_arrow(bench: Bench, *, top_k: TopK = 4, temperature: Temperature = 1.0, reads: Reads = "input") -> Fitted:
    """Weigh experts per matrix and token by |h·vₜ|, vₜ the first right singular vector of bₜaₜ; softmax of the top k.

    The sign of a singular vector means nothing, so magnitudes count. An expert scores 0 at a
    matrix that it leaves alone.
    """
    gates = {
        name: Gate(torch.stack([right_vectors(change.get(name), 1, size) for change in bench.library.experts.values()]),
                   torch.zeros(len(bench.library.experts)))
        for name, size in places_of(bench, "module").items()
    }  # fmt: skip
    rule = GateRule(score="absolute", reads=reads, temperature=temperature, top_k=top_k)
    return Fitted(experts=bench.library.experts, decision=Gates("arrow", rule, bench.library.names, gates))
