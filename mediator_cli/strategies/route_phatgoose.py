"""PHATGOOSE: each expert learns a gate of its own, alone; the gates then compete for every token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch.nn import functional

from mediator_cli.bundle.gates_record import GateRule
from mediator_cli.runtime.gates import Gate, Gates
from mediator_cli.strategies._gates import places_of
from mediator_cli.strategies._learned import facts_of
from mediator_cli.strategies._own_rows import SourceParameter, rows_by_expert
from mediator_cli.strategies._train import BatchRows, Rate, Schedule, Steps, train
from mediator_cli.strategies.batches import read_examples
from mediator_cli.strategies.strategy import Fitted, strategy

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mediator_cli.strategies.batches import Example
    from mediator_cli.strategies.bench import Bench

TopK = Annotated[int | None, Field(ge=1, description="Experts of one token; null: all.")]


@strategy(group="route", reference="https://arxiv.org/abs/2402.05859", needs=("rows", "tasks"))
def route_phatgoose(
    bench: Bench,
    *,
    top_k: TopK = 2,
    steps: Steps = 10,
    rows: BatchRows = 4,
    rate: Rate = 5e-3,
    source: SourceParameter = "valid",
) -> Fitted:
    """Weigh experts per matrix and token by ⟨LN(h), LN(vₜ)⟩/√d; softmax of the top k.

    vₜ is learned on the expert's own rows from zero, as a gate σ(vₜ·h) on what the frozen expert adds; LN has no
    parameters. The paper takes 100 steps of large batches: `steps` are those of each expert.
    """
    schedule, library = Schedule(steps, rows, rate), bench.library
    learned, facts = {}, {}
    for at, (name, own) in enumerate(rows_by_expert(bench, source).items()):
        examples = read_examples(bench.model, bench.tokenizer, own)
        learned[name], facts[name] = _learn_one(bench, name, examples, schedule, _told(bench, at, steps))
    rule = GateRule(reads="normalised", top_k=top_k)
    gates = {place: _compete([learned[name][place] for name in library.names]) for place in places_of(bench, "module")}
    return Fitted(experts=library.experts, decision=Gates("phatgoose", rule, library.names, gates), facts=facts)


def _told(bench: Bench, at: int, steps: int) -> Callable[[int], None]:
    total = steps * len(bench.library.experts)
    return lambda done: bench.progress("learning each expert's gate", at * steps + done, total)


def _learn_one(
    bench: Bench, name: str, examples: Sequence[Example], schedule: Schedule, told: Callable[[int], None]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Learn the gates [in] of one expert, by place; those of matrices that it leaves alone stay zero."""
    change = bench.library.experts[name]
    sizes = places_of(bench, "module")
    vectors = {place: torch.zeros(1, 1, size, requires_grad=place in change) for place, size in sizes.items()}
    gates = {place: Gate(vector, torch.zeros(1)) for place, vector in vectors.items()}
    decision = Gates("phatgoose", GateRule(weights="sigmoid"), (name,), gates)
    losses: list[float] = []
    wanted = [vectors[place] for place in change]
    for loss in train(bench, Fitted(experts={name: change}, decision=decision), wanted, examples, schedule):
        losses.append(loss)
        told(len(losses))
    return {place: vector.detach().flatten() for place, vector in vectors.items()}, facts_of(losses, schedule)


def _compete(vectors: Sequence[torch.Tensor]) -> Gate:
    """Lay gates [in] beside each other as inference scores them; what was learned as nothing scores 0."""
    directions = torch.stack([functional.layer_norm(vector, vector.shape, eps=_TINY) for vector in vectors])
    return Gate(directions[:, None] / directions.shape[-1] ** 0.5, torch.zeros(len(vectors)))


_TINY = 1e-30
"""Gates are learned from zero and may be short; only their direction counts."""
