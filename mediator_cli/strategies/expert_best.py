"""The one expert that does best on all tasks together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mediator_cli.strategies._valid import valid_tokens
from mediator_cli.strategies.strategy import Fitted, Fixed, strategy

if TYPE_CHECKING:
    from mediator_cli.strategies.bench import Bench


@strategy(group="reference", reference="https://arxiv.org/abs/2603.03535", needs=("rows",))
def expert_best(bench: Bench) -> Fitted:
    """Let one expert answer everything: that of the least validation loss, mean over tasks; of equal ones the first."""
    tokens = valid_tokens(bench)
    losses = dict(zip(tokens.models, tokens.losses.mean(axis=0).tolist(), strict=True))
    best = min(bench.library.names, key=lambda name: losses[name])
    facts = {"expert": best, "losses": losses}
    return Fitted({best: bench.library.experts[best]}, decision=Fixed({best: 1.0}), facts=facts)
