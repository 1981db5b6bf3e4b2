"""Which matrices lie in the MLPs of a model's layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mediator_cli.errors import Problem, RecipeError
from mediator_cli.runtime.gating import gate_places
from mediator_cli.strategies.library import scaled, summed

if TYPE_CHECKING:
    from mediator_cli.strategies.bench import Bench
    from mediator_cli.strategies.library import Change

_WORDS = ("mlp", "feed_forward", "feedforward", "ffn")


def mlp_places(bench: Bench) -> dict[str, int]:
    """List the MLPs with matrices that experts may change, with the width that they read.

    Raises RecipeError where no expert changes one.
    """
    found = gate_places(bench.model, _WORDS)
    if not _inside(bench, found):
        hint = "route the layers: route_sequence or route_smear"
        raise RecipeError(
            Problem("experts", "no expert changes the MLP of any layer, which is all that is mixed", hint)
        )
    return found


def split(bench: Bench, places: dict[str, int], scale: float) -> tuple[dict[str, Change], Change]:
    """Part experts into what they add to MLPs, by name, and `scale` times the sum of all that they add elsewhere."""
    inside = _inside(bench, places)
    experts = bench.library.experts
    routed = {name: {n: d for n, d in change.items() if n in inside} for name, change in experts.items()}
    others = [{n: d for n, d in change.items() if n not in inside} for change in experts.values()]
    return routed, summed([(scaled(change, scale), 1.0) for change in others])


def _inside(bench: Bench, places: dict[str, int]) -> set[str]:
    changed = {name for change in bench.library.experts.values() for name in change}
    paths = {id(module): path for path, module in bench.model.named_modules()}
    opened = bench.model.opened
    return {
        mixer.name
        for module, mixer in zip(opened.modules, opened.mixers, strict=True)
        if mixer.name in changed and any(paths[id(module)].startswith(f"{place}.") for place in places)
    }
