"""Gates that are learned on the rows of all tasks together, the experts frozen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch

from mediator_cli.errors import Problem, RecipeError
from mediator_cli.runtime.gates import Gate, Gates
from mediator_cli.strategies._gates import average_states, contrast, places_of
from mediator_cli.strategies._own_rows import rows_by_expert
from mediator_cli.strategies._train import train
from mediator_cli.strategies.batches import read_examples
from mediator_cli.strategies.strategy import Fitted

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mediator_cli.bundle.gates_record import GateRule
    from mediator_cli.strategies._train import Schedule
    from mediator_cli.strategies.bench import Bench
    from mediator_cli.strategies.library import Change

Start = Literal["average_activation", "zeros"]
_MARGIN = 4.0
_EXAMPLES = 10
_SOME = 5
"""Steps that a reported loss is the mean of."""


def start_gates(bench: Bench, rule: GateRule, start: Start) -> dict[str, Gate]:
    """Make the gates that learning begins with: none is preferred, or each expert where its own prompts are."""
    n_experts = len(bench.library.experts)
    if start == "zeros":
        return {
            name: Gate(torch.zeros(n_experts, 1, size), torch.zeros(n_experts))
            for name, size in places_of(bench, rule.at).items()
        }
    averages = average_states(bench, rule, rows_by_expert(bench), _EXAMPLES, "prompt")
    return {name: contrast(own, _MARGIN) for name, own in averages.items()}


def learn(
    bench: Bench,
    gates: Gates,
    schedule: Schedule,
    experts: Mapping[str, Change] | None = None,
    folded: Sequence[Change] = (),
) -> Fitted:
    """Learn gates on the validation rows of all seen tasks, from the values that they have.

    Gates that stand at several places are learned as one. Raises RecipeError where there are no rows.
    """
    rows = [row for _, row in bench.fit_rows()]
    if not rows:
        raise RecipeError(Problem("tasks", "there are no validation rows to learn gates on", "give some"))
    experts = bench.library.experts if experts is None else experts
    learning = Gates(gates.method, gates.rule, gates.experts, _copies(gates.by_name, learns=True))
    parts = {id(part): part for gate in learning.by_name.values() for part in (gate.directions, gate.bias)}
    fitted = Fitted(experts=experts, folded=tuple(folded), decision=learning)
    examples = read_examples(bench.model, bench.tokenizer, rows)
    losses: list[float] = []
    for loss in train(bench, fitted, list(parts.values()), examples, schedule):
        losses.append(loss)
        bench.progress("learning gates", len(losses), schedule.steps)
    done = Gates(gates.method, gates.rule, gates.experts, _copies(learning.by_name, learns=False))
    return Fitted(experts=experts, folded=tuple(folded), decision=done, facts=facts_of(losses, schedule))


def facts_of(losses: Sequence[float], schedule: Schedule) -> dict[str, Any]:
    """Say how learning went: mean losses of the first and of the last steps."""
    facts: dict[str, Any] = {"steps": schedule.steps, "rows_per_step": schedule.rows, "rate": schedule.rate}
    if losses:
        first, last = losses[:_SOME], losses[-_SOME:]
        facts |= {"first_loss": sum(first) / len(first), "last_loss": sum(last) / len(last)}
    return facts


def _copies(gates: Mapping[str, Gate], *, learns: bool) -> dict[str, Gate]:
    """Copy gates, those that stand at several places once."""
    made: dict[int, Gate] = {}
    for gate in gates.values():
        if id(gate) not in made:
            parts = (part.detach().clone().requires_grad_(learns) for part in (gate.directions, gate.bias))
            made[id(gate)] = Gate(*parts)
    return {name: made[id(gate)] for name, gate in gates.items()}
