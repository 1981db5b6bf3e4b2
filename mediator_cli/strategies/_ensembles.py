"""What ensembles have in common: learned weights, and who is a member."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Field

from mediator_cli.runtime.mixing import DENSE
from mediator_cli.strategies._simplex import minimise, mixture_loss

if TYPE_CHECKING:
    from mediator_cli.strategies._simplex import Floats, Found
    from mediator_cli.strategies._valid import ValidTokens
    from mediator_cli.strategies.bench import Bench

WithBase = Annotated[bool, Field(description="Whether the base is a member too.")]
LEAST_SHARE = 1e-4
"""Members of a smaller learned weight are left out: each costs a pass."""


def members_of(bench: Bench, with_base: bool) -> tuple[str, ...]:
    """Name the members; the base is called `dense`."""
    return (*((DENSE,) if with_base else ()), *bench.library.names)


def learn_shares(tokens: ValidTokens, members: tuple[str, ...], tasks: Floats | None = None) -> Found:
    """Learn weights [members] of probabilities on the tokens of validation rows; of some tasks alone, if so told."""
    columns = [tokens.models.index(name) for name in members]
    own = slice(None) if tasks is None else np.isin(tokens.task, tasks)
    shares = tokens.shares[own]
    if tasks is not None:
        shares = shares * (len(tokens.tasks) / len(tasks))
    return minimise(mixture_loss(tokens.log_probs[own][:, columns], shares), len(columns))


def named(members: tuple[str, ...], weights: Floats) -> dict[str, float]:
    """Give weights by member, without those that are too small to be worth a pass, so that the sum is 1."""
    chosen = np.where(weights >= LEAST_SHARE, weights, 0.0)
    chosen = chosen / chosen.sum()
    return {name: float(weight) for name, weight in zip(members, chosen, strict=True) if weight}
