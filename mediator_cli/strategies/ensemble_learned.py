"""All experts answer, each on its own: a weighted mean of their next-token probabilities."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mediator_cli.strategies._ensembles import WithBase, learn_shares, members_of, named
from mediator_cli.strategies._valid import valid_tokens
from mediator_cli.strategies.strategy import Fitted, Fixed, strategy

if TYPE_CHECKING:
    from mediator_cli.strategies.bench import Bench


@strategy(group="ensemble", reference="https://arxiv.org/abs/2603.03535", needs=("rows",))
def ensemble_learned(bench: Bench, *, with_base: WithBase = False) -> Fitted:
    """Mix probabilities of the next token with learned weights: p = Σ wₜpₜ, Σw = 1, the same for all inputs.

    The validation loss -Σ ln Σ wₜpₜ is convex in w. Exponentiated gradient on log-probabilities that each expert was
    asked for once finds its minimum; `gap` bounds how far from it the result is, in nats of a row's loss. Members below
    a weight of 0.0001 are left out.
    """
    tokens, members = valid_tokens(bench), members_of(bench, with_base)
    found = learn_shares(tokens, members)
    weights = named(members, found.weights)
    facts = {"weights": weights, "loss": found.loss, "gap": found.gap, "steps": found.steps}
    experts = {name: change for name, change in bench.library.experts.items() if name in weights}
    given = {name: weights[name] for name in experts}
    return Fitted(experts, decision=Fixed(given), combine="probabilities", facts=facts)
