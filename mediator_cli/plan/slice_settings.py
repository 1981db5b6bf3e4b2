"""What slices say of methods, as overrides that are bound to their tensors; and what is wrong with slices alone."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from mediator_cli.errors import Problem, did_you_mean
from mediator_cli.recipe.average import AverageSpec
from mediator_cli.recipe.schema import OverrideSpec
from mediator_cli.recipe.slices import AVERAGE, WITH_SLICES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mediator_cli.methods.method import Method
    from mediator_cli.recipe.load import LoadedRecipe
    from mediator_cli.recipe.slices import SliceSpec
    from mediator_cli.recipe.text import FieldPath

_COPY = "passthrough"


def with_slices(loaded: LoadedRecipe) -> LoadedRecipe:
    """Write what slices say of methods as overrides before the recipe's own; `group_of` tells to what each is bound."""
    if not loaded.recipe.slices:
        return loaded
    found: list[tuple[FieldPath, OverrideSpec]] = []
    for at, spec in enumerate(loaded.recipe.slices):
        found += [(("slices", at, *rest), override) for rest, override in _overrides_of(spec)]
    if loaded.recipe.outside not in (WITH_SLICES, AVERAGE):
        found.append((("outside",), _method(AverageSpec(method=_COPY))))
    found += [(("overrides", at), override) for at, override in enumerate(loaded.recipe.overrides)]
    written: dict[FieldPath, FieldPath] = {("overrides", at): place for at, (place, _) in enumerate(found)}
    # The method of a slice stands in its own field, not in that of an override.
    written |= {("overrides", at, "average"): (*p, "average") for at, (p, _) in enumerate(found) if len(p) == 2}
    recipe = loaded.recipe.model_copy(update={"overrides": tuple(override for _, override in found)})
    return replace(loaded, recipe=recipe, written=MappingProxyType({**loaded.written, **written}))


def _overrides_of(spec: SliceSpec) -> Iterator[tuple[FieldPath, OverrideSpec]]:
    if len(spec.sources) == 1 and not (spec.average and spec.average.names_method):
        yield (), _method(AverageSpec(method=_COPY))
    if spec.average:
        yield (), _method(spec.average)
    for at, own in enumerate(spec.overrides):
        yield ("overrides", at), OverrideSpec(**{name: getattr(own, name) for name in own.model_fields_set | {"match"}})


def _method(average: AverageSpec) -> OverrideSpec:
    return OverrideSpec(match="*", average=average)


def group_of(loaded: LoadedRecipe, override: int) -> int | None:
    """Tell to which group of tensors an override is bound; None where it may choose any."""
    place = loaded.written.get(("overrides", override), ())
    if place[:1] == ("slices",):
        return int(place[1])
    return len(loaded.recipe.slices) if place[:1] == ("outside",) else None


def check_slices(loaded: LoadedRecipe, methods: Sequence[Method]) -> Iterator[Problem]:
    """Say what is wrong with slices that needs no checkpoint to see."""
    if loaded.recipe.slices:
        yield from _check_sources(loaded)
        yield from _check_company(loaded, methods)


def _check_sources(loaded: LoadedRecipe) -> Iterator[Problem]:
    recipe = loaded.recipe
    known = ["base", *(expert.name for expert in recipe.experts)]
    for at, spec in enumerate(recipe.slices):
        for number, source in enumerate(spec.sources):
            if source.source not in known:
                place = loaded.place("slices", at, "sources", number, "source")
                yield Problem(place, f"no source '{source.source}'", did_you_mean(source.source, known))
    if recipe.outside not in (WITH_SLICES, AVERAGE, *known):
        hint = did_you_mean(recipe.outside, [WITH_SLICES, AVERAGE, *known])
        yield Problem(loaded.place("outside"), f"no source '{recipe.outside}'", hint)


def _check_company(loaded: LoadedRecipe, methods: Sequence[Method]) -> Iterator[Problem]:
    """Refuse what does not go together with slices."""
    if loaded.recipe.assign.rule != "none":
        message = "stacked layers are merged, not routed: an expert has no delta to a layer that it is not tuned from"
        yield Problem(loaded.place("assign", "rule"), message, "write `assign: {rule: none}`")
    for method in methods:
        if method.space == "adapter" or method.needs_moments:
            kind = "adapters" if method.space == "adapter" else "experts with second moments"
            message = f"{method.name} merges {kind} of one base, and here layers are stacked"
            yield Problem(loaded.place("slices"), message, "choose another method")
    if loaded.recipe.align is not None:
        message = "experts are aligned to a base with the same layers, and here layers are stacked"
        yield Problem(loaded.place("align"), message, "align in a merge of its own before")
