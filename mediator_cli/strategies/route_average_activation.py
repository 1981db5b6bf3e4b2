"""Experts are known by the average hidden state of a few of their prompts; nothing is learned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field

from mediator_cli.bundle.gates_record import GateRule
from mediator_cli.runtime.gates import Gate, Gates
from mediator_cli.strategies._gates import AtParameter, Averages, average_states, contrast
from mediator_cli.strategies._own_rows import SourceParameter, rows_by_expert
from mediator_cli.strategies.strategy import Fitted, strategy

if TYPE_CHECKING:
    from mediator_cli.strategies.bench import Bench

Form = Annotated[
    Literal["contrast", "paper"],
    Field(description="contrast: towards what sets an expert apart, in units of the spread. paper: unit average / √d."),
]
Seen = Annotated[
    Literal["prompt", "last"], Field(description="Average over all tokens of a prompt, or its last token alone.")
]
Per = Annotated[
    Literal["sequence", "token"], Field(description="One choice from the mean over the prompt, or one for each token.")
]
Examples = Annotated[int, Field(ge=1, description="Prompts of each expert that are read.")]
TopK = Annotated[int | None, Field(ge=1, description="Experts at once; null: all.")]
Margin = Annotated[
    float, Field(gt=0, description="contrast: how far an expert's score is above the others' at its own average.")
]


@strategy(group="route", reference="https://arxiv.org/abs/2405.11157", needs=("rows", "tasks"))
def route_average_activation(
    bench: Bench,
    *,
    form: Form = "contrast",
    seen: Seen = "prompt",
    per: Per = "sequence",
    at: AtParameter = "module",
    n_examples: Examples = 10,
    top_k: TopK = 4,
    margin: Margin = 5.0,
    source: SourceParameter = "valid",
) -> Fitted:
    """Weigh experts by ⟨h, vₜ⟩, vₜ what the expert's own prompts read on average at this place; softmax of the top k.

    The paper's form, vₜ = h̄ₜ/‖h̄ₜ‖ and ⟨h, vₜ⟩/√d for each token, is `form: paper`, `seen: last`, `per: token`.
    """
    rule = GateRule(at=at, per=per, top_k=top_k)
    averages = average_states(bench, rule, rows_by_expert(bench, source), n_examples, seen)
    gates = {name: _paper(own) if form == "paper" else contrast(own, margin) for name, own in averages.items()}
    return Fitted(
        experts=bench.library.experts,
        decision=Gates("average_activation", rule, bench.library.names, gates),
        facts={"n_examples": n_examples},
    )


def _paper(averages: Averages) -> Gate:
    unit = torch.nn.functional.normalize(averages.own, dim=-1) / averages.own.shape[-1] ** 0.5
    return Gate(unit[:, None].contiguous(), torch.zeros(len(unit)))
