"""All strategies by name: every public file of this package that holds one, and those that other packages register."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules
from typing import TYPE_CHECKING

from mediator_cli import strategies as package
from mediator_cli.errors import Problem, RecipeError, did_you_mean
from mediator_cli.strategies.strategy import Strategy

if TYPE_CHECKING:
    from collections.abc import Mapping

ENTRY_POINTS = "mediator.strategies"


@cache
def strategies() -> Mapping[str, Strategy]:
    """Find all strategies, sorted by name; a file `arrow.py` holds the strategy `arrow`."""
    found = {}
    for module in iter_modules(package.__path__):
        own = getattr(import_module(f"{package.__name__}.{module.name}"), module.name, None)
        if isinstance(own, Strategy):
            found[own.name] = own
    for entry in entry_points(group=ENTRY_POINTS):
        if isinstance(loaded := entry.load(), Strategy):
            found[loaded.name] = loaded
    return dict(sorted(found.items()))


def get_strategy(name: str, place: str) -> Strategy:
    """Give a strategy by name; raise RecipeError with a suggestion for an unknown one."""
    known = strategies()
    if name not in known:
        raise RecipeError(Problem(place, f"no strategy '{name}'", did_you_mean(name, known)))
    return known[name]
