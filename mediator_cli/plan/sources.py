"""Open base and experts and check that they belong together. Headers and configs only."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mediator_cli.checkpoint.adapter.open import Adapter, open_adapter
from mediator_cli.checkpoint.layout import missing_layers
from mediator_cli.checkpoint.source import Checkpoint, find_location, is_adapter, open_checkpoint
from mediator_cli.errors import CheckpointError, Problem
from mediator_cli.plan.fit import Fit, fit_expert, own_tensors
from mediator_cli.plan.keep import kept_patterns
from mediator_cli.plan.model import ExpertSource
from mediator_cli.plan.slices import fitting_base

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mediator_cli.checkpoint.hub.find import Access
    from mediator_cli.plan.keep import Kept
    from mediator_cli.recipe.load import LoadedRecipe
    from mediator_cli.recipe.schema import ExpertSpec


def open_base(loaded: LoadedRecipe, access: Access) -> Checkpoint:
    """Open the base; raise CheckpointError with the recipe's line in front of each problem."""
    place = loaded.place("base")
    try:
        location = find_location(loaded.recipe.base, loaded.resolve(loaded.recipe.base), access)
        base = own_tensors(open_checkpoint(location.folder, location.repo))
    except CheckpointError as error:
        raise CheckpointError(_at(place, error)) from None
    if fault := missing_layers(base.tensors, base.config):
        hint = "is the checkpoint complete?"
        raise CheckpointError(Problem(f"{place}: {location.shown}", fault, hint))
    return base


def open_experts(
    loaded: LoadedRecipe, base: Checkpoint, kept: Kept, access: Access
) -> tuple[list[ExpertSource], list[Problem]]:
    """Open all experts and fit them to the base; give those that fit and all problems of the others."""
    experts: list[ExpertSource] = []
    problems: list[Problem] = []
    for index, spec in enumerate(loaded.recipe.experts):
        place = loaded.place("experts", index, "model")
        prompts = loaded.resolve(spec.prompts) if spec.prompts else None
        try:
            source = _open_expert(loaded, spec, base, access)
        except CheckpointError as error:
            problems += _at(place, error)
            continue
        fit = Fit()
        if not isinstance(source, Adapter):
            like = fitting_base(loaded, base, source)
            fit = fit_expert(place, spec.name, like, source, kept.names, kept_patterns(loaded) or ())
        problems += fit.problems
        experts.append(ExpertSource(spec.name, spec.weight, source, prompts, fit.layout, fit.notices))
    return experts, problems


def check_experts_alone(loaded: LoadedRecipe, access: Access) -> Iterator[Problem]:
    """Say what is wrong with the experts' folders where there is no base to compare them with."""
    for index, spec in enumerate(loaded.recipe.experts):
        try:
            location = find_location(spec.model, loaded.resolve(spec.model), access)
            if not is_adapter(location.folder):
                open_checkpoint(location.folder, location.repo)
        except CheckpointError as error:
            yield from _at(loaded.place("experts", index, "model"), error)


def _open_expert(loaded: LoadedRecipe, spec: ExpertSpec, base: Checkpoint, access: Access) -> Checkpoint | Adapter:
    location = find_location(spec.model, loaded.resolve(spec.model), access)
    if is_adapter(location.folder):
        return open_adapter(location.folder, base.tensors, location.repo)
    return own_tensors(open_checkpoint(location.folder, location.repo))


def _at(place: str, error: CheckpointError) -> list[Problem]:
    return [replace(item, place=f"{place}: {item.place}") for item in error.problems]
