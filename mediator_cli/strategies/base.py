"""The base alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mediator_cli.strategies.strategy import Fitted, strategy

if TYPE_CHECKING:
    from mediator_cli.strategies.bench import Bench


@strategy(group="reference", reference="https://arxiv.org/abs/2603.03535")
def base(bench: Bench) -> Fitted:
    """Let the base answer, without any expert."""
    return Fitted()
