"""All experts answer, each on its own: their logits are averaged, which is a geometric mean of probabilities."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from mediator_cli.strategies._ensembles import WithBase, members_of, named
from mediator_cli.strategies._fitting import names_of
from mediator_cli.strategies._simplex import geometric_loss, minimise
from mediator_cli.strategies._valid import valid_places, valid_tokens
from mediator_cli.strategies.strategy import Fitted, Fixed, strategy

if TYPE_CHECKING:
    from mediator_cli.strategies.bench import Bench

Kind = Annotated[
    Literal["uniform", "learned"], Field(description="The same weight for all, or learned on validation rows.")
]


@strategy(group="ensemble", reference="https://arxiv.org/abs/2603.03535", needs=("rows",))
def ensemble_geometric(bench: Bench, *, weights: Kind = "learned", with_base: WithBase = False) -> Fitted:
    """Average logits with weights: p ∝ Π pₜ^wₜ, Σw = 1, the same for all inputs.

    Learned weights minimise a convex bound on the validation loss: of each place the 32 tokens that some expert finds
    most probable are kept, and the rest of the vocabulary is bounded by Hölder's inequality. `bound` is that bound, in
    nats of a row's loss; the loss itself needs a pass and is left to whoever scores.
    """
    members = members_of(bench, with_base)
    if weights == "uniform":
        shares: dict[str, float] = dict.fromkeys(members, 1 / len(members))
        facts: dict[str, Any] = {"weights": shares}
        names_of(bench)
    else:
        shares, facts = _learn(bench, members)
    experts = {name: change for name, change in bench.library.experts.items() if name in shares}
    given = {name: shares[name] for name in experts}
    return Fitted(experts, decision=Fixed(given), combine="logits", facts=facts)


def _learn(bench: Bench, members: tuple[str, ...]) -> tuple[dict[str, float], dict[str, Any]]:
    tokens, places = valid_tokens(bench), valid_places(bench)
    columns = [tokens.models.index(name) for name in members]
    kept, tail = (
        np.concatenate([values[place.place][..., columns] for place, values in zip(places, each, strict=True)])
        for each in ([place.log_probs for place in places], [place.tail for place in places])
    )
    loss = geometric_loss(tokens.log_probs[:, columns], tokens.shares, kept.astype(np.float64), tail.astype(np.float64))
    found = minimise(loss, len(columns))
    shares = named(members, found.weights)
    return shares, {"weights": shares, "bound": found.loss, "gap": found.gap, "steps": found.steps}
