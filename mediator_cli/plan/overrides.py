"""What holds for each tensor: the recipe's settings, and on top the overrides that choose it, in their order."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from mediator_cli.checkpoint.layout import natural_key, place_of
from mediator_cli.errors import Problem, did_you_mean
from mediator_cli.plan.gradients import GradedMethod, positions, resolve_graded, value_at
from mediator_cli.plan.model import ResolvedExtract

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from mediator_cli.checkpoint.source import Checkpoint
    from mediator_cli.methods.registry import ResolvedMethod
    from mediator_cli.recipe.load import LoadedRecipe
    from mediator_cli.recipe.schema import ExtractSpec, OverrideSpec

BY_MAGNITUDE = 0.4
"""Kept values are multiplied by density ** -this; the best of those tried on validation rows, see the README."""


@dataclass(frozen=True)
class TensorSettings:
    """How one tensor is merged and extracted; `weights` are the experts' merge coefficients in recipe order."""

    average: ResolvedMethod
    extract: ResolvedExtract
    weights: tuple[float, ...]


@dataclass(frozen=True)
class _Chosen:
    """What the same overrides, by their index, make of the recipe's settings; numbers may still be anchors."""

    indices: tuple[int, ...]
    method: GradedMethod
    extract: ResolvedExtract
    weights: Mapping[str, float | tuple[float, ...]]

    def at(self, position: float) -> TensorSettings:
        weights = tuple(value_at(weight, position) for weight in self.weights.values())
        return TensorSettings(self.method.at(position), self.extract, weights)


def check_methods(loaded: LoadedRecipe) -> tuple[list[GradedMethod], list[Problem]]:
    """Resolve the methods that the recipe and its overrides name; needs no checkpoint.

    What overrides change by parameters alone depends on the tensors, so `resolve_settings` checks it.
    """
    overrides = enumerate(loaded.recipe.overrides)
    named = [index for index, override in overrides if override.average is not None and override.average.names_method]
    methods: list[GradedMethod] = []
    problems: list[Problem] = []
    for indices in [(), *((index,) for index in named)]:
        answer = _method_of(loaded, indices)
        if isinstance(answer, GradedMethod):
            methods.append(answer)
        else:
            problems += answer
    return methods, problems


def check_overrides(loaded: LoadedRecipe, names: Iterable[str], copied: Collection[str] = ()) -> Iterator[Problem]:
    """Check that every override chooses a tensor that is merged, and names layers and experts that exist."""
    every = sorted(names, key=natural_key)
    known = [name for name in every if name not in copied]
    numbers = {number for name in every if (number := _layer_number(name)) is not None}
    experts = [expert.name for expert in loaded.recipe.experts]
    for index, override in enumerate(loaded.recipe.overrides):
        for expert in override.weights or {}:
            if expert not in experts:
                place = loaded.place("overrides", index, "weights", expert)
                yield Problem(place, f"no expert '{expert}'", did_you_mean(expert, experts))
        beyond = [number for number in override.layers or () if number not in numbers]
        if beyond:
            has = f"they are {min(numbers)} to {max(numbers)}" if numbers else "its tensors are in no layers"
            place = loaded.place("overrides", index, "layers")
            yield Problem(place, f"the base has no layer {beyond[0]}", has)
        elif not any(_chooses(override, name) for name in known):
            yield _matches_nothing(loaded, index, override, known)


def _matches_nothing(loaded: LoadedRecipe, index: int, override: OverrideSpec, names: Sequence[str]) -> Problem:
    elsewhere = [name for name in names if fnmatchcase(name, override.match)]
    if elsewhere:
        message = f"'{override.match}' matches no tensor in these layers"
        return Problem(loaded.place("overrides", index), message, f"it matches {elsewhere[0]}")
    hint = f"tensor names look like {names[-1]}" if names else "all tensors are the base's"
    return Problem(loaded.place("overrides", index, "match"), f"'{override.match}' matches no tensor", hint)


def _layer_number(name: str) -> int | None:
    layer = place_of(name).layer
    return None if layer is None else int(layer.rpartition(".")[2])


def _chooses(override: OverrideSpec, name: str) -> bool:
    in_layers = override.layers is None or _layer_number(name) in override.layers
    return in_layers and fnmatchcase(name, override.match)


def resolve_settings(
    loaded: LoadedRecipe, base: Checkpoint, copied: Collection[str] = ()
) -> tuple[dict[str, TensorSettings], list[Problem]]:
    """Resolve what holds for each tensor of the base, and say what is wrong with it; `copied` ones are not merged."""
    settings: dict[str, TensorSettings] = {}
    problems: dict[str, Problem] = {}
    known: dict[tuple[int, ...], _Chosen | list[Problem]] = {}
    at = positions(base.tensors, base.config)
    for name in base.tensors:
        indices = tuple(n for n, override in enumerate(loaded.recipe.overrides) if _chooses(override, name))
        if indices not in known:
            known[indices] = _choose(loaded, indices)
        chosen = known[indices]
        if not isinstance(chosen, _Chosen):
            problems = {**{problem.place: problem for problem in chosen}, **problems}
            continue
        settings[name] = chosen.at(at[name])
        if name not in copied and (problem := _check_sum(loaded, chosen, settings[name], name)):
            problems.setdefault(problem.place, problem)
    return settings, list(problems.values())


def _choose(loaded: LoadedRecipe, indices: tuple[int, ...]) -> _Chosen | list[Problem]:
    method = _method_of(loaded, indices)
    if not isinstance(method, GradedMethod):
        return method
    extract: ExtractSpec = loaded.recipe.extract
    weights = {expert.name: expert.weight for expert in loaded.recipe.experts}
    for index in indices:
        override = loaded.recipe.overrides[index]
        weights |= {name: weight for name, weight in (override.weights or {}).items() if name in weights}
        if override.extract is not None:
            changed = override.extract.model_dump(exclude_none=True)
            # These tensors have a share of their own, so they take no part in the common one.
            alone = {"over": "tensor"} if {"density", "select"} & set(changed) else {}
            extract = extract.model_copy(update=changed | alone)
    return _Chosen(indices, method, resolve_extract(extract), weights)


def _method_of(loaded: LoadedRecipe, indices: Sequence[int]) -> GradedMethod | list[Problem]:
    """Resolve the method that is left when these overrides have been applied in their order."""
    spec = loaded.recipe.average
    name, preset, params = spec.method, spec.preset, spec.params
    home: tuple[str | int, ...] = ("average",)
    homes = dict.fromkeys(params, home)
    for index in indices:
        average = loaded.recipe.overrides[index].average
        if average is None:
            continue
        field = ("overrides", index, "average")
        if average.names_method:
            name, preset, params, home, homes = average.method, average.preset, {}, field, {}
        params = {**params, **average.params}
        homes |= dict.fromkeys(average.params, field)

    def place(parameter: str, *rest: int) -> str:
        return loaded.place(*homes.get(parameter, home), parameter, *rest)

    return resolve_graded(name, preset, params, place)


def _check_sum(loaded: LoadedRecipe, chosen: _Chosen, settings: TensorSettings, tensor: str) -> Problem | None:
    """Refuse weights that a method would divide by, but sum to zero."""
    method = settings.average.method
    if method.normalizes is None or not method.normalizes(settings.average.params):
        return None
    if abs(sum(settings.weights)) >= 1e-12:
        return None
    setters = [index for index in chosen.indices if loaded.recipe.overrides[index].weights]
    place = loaded.place("overrides", setters[-1], "weights") if setters else loaded.place("experts")
    changing = setters or any(isinstance(weight, tuple) for weight in chosen.weights.values())
    where = f" on {tensor}" if changing else ""
    message = f"the weights sum to zero{where}, and {method.name} divides by their sum"
    return Problem(place, message, "change a weight or set normalize: false")


def resolve_extract(extract: ExtractSpec) -> ResolvedExtract:
    """Fill the defaults in that depend on other fields."""
    return ResolvedExtract(extract.density, extract.over, extract.select, _rescale(extract), extract.values)


def _rescale(extract: ExtractSpec) -> float:
    if isinstance(extract.rescale, bool):
        return 1 / extract.density if extract.rescale else 1.0
    if extract.rescale is not None:
        return extract.rescale
    # At random, the expectation is kept. The largest entries are more than their share of the delta; how much is lost
    # with the others was measured on the demo's experts.
    exponent = 1.0 if extract.select == "random" else BY_MAGNITUDE
    return float(extract.density**-exponent)
