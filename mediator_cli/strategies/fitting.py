"""Fit a strategy on a bench, with parameters that were checked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mediator_cli.strategies.bench import Bench
    from mediator_cli.strategies.strategy import Fitted, Strategy


def run(chosen: Strategy, bench: Bench, parameters: Mapping[str, Any] | None = None) -> Fitted:
    """Fit a strategy with parameters that its schema has checked; raises pydantic's ValidationError for others."""
    checked = chosen.schema.model_validate(dict(parameters or {}))
    return chosen.fit(bench, **{name: getattr(checked, name) for name in chosen.schema.model_fields})
