"""Whether the methods of stacked layers suit what is stacked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mediator_cli.errors import Problem

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from mediator_cli.plan.overrides import TensorSettings
    from mediator_cli.plan.slices import Stack
    from mediator_cli.recipe.load import LoadedRecipe


def check_stack(
    loaded: LoadedRecipe, stack: Stack, settings: Mapping[str, TensorSettings], kept: Collection[str]
) -> Iterator[Problem]:
    """Check that each slice has as many sources as its method merges, and base layers where it adds to them."""
    told: set[int] = set()
    for name, found in settings.items():
        made = stack.made[name]
        if made.group in told or name in kept or made.group < 0:
            continue
        place = _place(loaded, made.group)
        method, (fewest, most) = found.average.method, found.average.method.n_inputs
        if len(made.inputs) < fewest or (most is not None and len(made.inputs) > most):
            told.add(made.group)
            wanted = f"{fewest}" if fewest == most else f"{fewest} or more"
            message = f"{method.name} merges {wanted} sources, here are {len(made.inputs)}"
            yield Problem(place, message, "choose another method or other sources")
        elif found.average.space == "delta" and made.base is None:
            told.add(made.group)
            message = f"{method.name} merges deltas, and the base has no layer for {made.inputs[0][1]}"
            yield Problem(place, message, "name the base's layers with `base`")


def _place(loaded: LoadedRecipe, group: int) -> str:
    if group < len(loaded.recipe.slices):
        return loaded.place("slices", group, "sources")
    return loaded.place("outside")
