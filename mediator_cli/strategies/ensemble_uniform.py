"""All experts answer, each on its own: the mean of their next-token probabilities."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mediator_cli.strategies._ensembles import WithBase, members_of
from mediator_cli.strategies._fitting import names_of
from mediator_cli.strategies.strategy import Fitted, Fixed, strategy

if TYPE_CHECKING:
    from mediator_cli.strategies.bench import Bench


@strategy(group="ensemble", reference="https://arxiv.org/abs/2603.03535")
def ensemble_uniform(bench: Bench, *, with_base: WithBase = False) -> Fitted:
    """Average the probabilities of the next token: p = Σ pₜ / T. Every token costs a pass of each member."""
    names = names_of(bench)
    weights = dict.fromkeys(names, 1 / len(members_of(bench, with_base)))
    return Fitted(bench.library.experts, decision=Fixed(weights), combine="probabilities", facts={"weights": weights})
