"""What holds for each tensor: the recipe's settings, and on top the overrides that choose it, in their order."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from mediator_cli.checkpoint.layout import natural_key, place_of
from mediator_cli.errors import Problem, did_you_mean
from mediator_cli.plan.gradients import OTHERS, GradedMethod, positions, resolve_own, value_at
from mediator_cli.plan.model import ResolvedExtract
from mediator_cli.plan.slice_settings import group_of
from mediator_cli.recipe.extract import ExtractSpec
from mediator_cli.recipe.modes import mode_faults

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from mediator_cli.checkpoint.source import Checkpoint
    from mediator_cli.methods.method import ResolvedMethod
    from mediator_cli.plan.slices import Stack
    from mediator_cli.recipe.load import LoadedRecipe
    from mediator_cli.recipe.schema import OverrideSpec
    from mediator_cli.recipe.text import FieldPath

BY_MAGNITUDE = 0.4
"""Kept values are multiplied by density ** -this; the best of those tried on validation rows, see the README."""


MASK_LAMBDA = 0.4
"""Where TALL-masks' published program begins; the paper chooses one for each task on validation rows."""


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
    weights: tuple[tuple[str, float | tuple[float, ...]], ...]

    def at(self, position: float) -> TensorSettings:
        weights = tuple(value_at(weight, position) for _, weight in self.weights)
        return TensorSettings(self.method.at(position, [name for name, _ in self.weights]), self.extract, weights)


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


def check_overrides(
    loaded: LoadedRecipe, names: Iterable[str], copied: Collection[str] = (), stack: Stack | None = None
) -> Iterator[Problem]:
    """Check that every override chooses a tensor that is merged, and names layers and experts that exist."""
    every = sorted(names, key=natural_key)
    merged = [name for name in every if name not in copied]
    numbers = {number for name in every if (number := _layer_number(name)) is not None}
    experts = _names(loaded)
    for index, override in enumerate(loaded.recipe.overrides):
        known = [name for name in merged if _is_in_group(loaded, index, name, stack)]
        for expert in override.weights or {}:
            if expert not in experts:
                place = loaded.place("overrides", index, "weights", expert)
                yield Problem(place, f"no expert '{expert}'", did_you_mean(expert, experts))
        beyond = [number for number in override.layers or () if number not in numbers]
        if beyond:
            has = f"they are {min(numbers)} to {max(numbers)}" if numbers else "its tensors are in no layers"
            place = loaded.place("overrides", index, "layers")
            yield Problem(place, f"the base has no layer {beyond[0]}", has)
        elif not override.optional and not any(_chooses(override, name) for name in known):
            yield _matches_nothing(loaded, index, override, known)


def tell_unmatched(loaded: LoadedRecipe, names: Collection[str], stack: Stack | None = None) -> Iterator[str]:
    """Tell of overrides that may match nothing, and do."""
    for index, override in enumerate(loaded.recipe.overrides):
        known = (name for name in names if _is_in_group(loaded, index, name, stack))
        if override.optional and not any(_chooses(override, name) for name in known):
            yield f"{loaded.place('overrides', index)}: '{override.match}' matches no tensor"


def _names(loaded: LoadedRecipe) -> list[str]:
    """Name what may be merged: experts, and the base where layers are stacked."""
    return [*(["base"] if loaded.recipe.slices else []), *(expert.name for expert in loaded.recipe.experts)]


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


def _is_in_group(loaded: LoadedRecipe, index: int, name: str, stack: Stack | None) -> bool:
    """Whether an override may choose a tensor: those that belong to a slice choose only in it."""
    bound = group_of(loaded, index)
    return bound is None or stack is None or stack.made[name].group == bound


def resolve_settings(
    loaded: LoadedRecipe, base: Checkpoint, copied: Collection[str] = (), stack: Stack | None = None
) -> tuple[dict[str, TensorSettings], list[Problem]]:
    """Resolve what holds for each tensor of the base, and say what is wrong with it; `copied` ones are not merged.

    With a stack, `base` has the tensors that it makes.
    """
    settings: dict[str, TensorSettings] = {}
    problems: dict[str, Problem] = {}
    known: dict[tuple[object, ...], _Chosen | list[Problem]] = {}
    at = stack.positions if stack else positions(base.tensors, base.config, loaded.recipe.anchors)
    bound = [group_of(loaded, index) for index in range(len(loaded.recipe.overrides))]
    for name in base.tensors:
        group = stack.made[name].group if stack else None
        overrides = enumerate(loaded.recipe.overrides)
        indices = tuple(n for n, each in overrides if bound[n] in (None, group) and _chooses(each, name))
        if (group, indices) not in known:
            known[group, indices] = _choose(loaded, indices, _weights_of(loaded, group, stack))
        chosen = known[group, indices]
        if not isinstance(chosen, _Chosen):
            problems = {**{problem.place: problem for problem in chosen}, **problems}
            continue
        settings[name] = chosen.at(at[name])
        if name not in copied and (problem := _check_weights(loaded, chosen, settings[name], name)):
            problems.setdefault(problem.place, problem)
    return settings, list(problems.values())


_Weights = tuple[tuple[str, float | tuple[float, ...]], ...]


def _weights_of(loaded: LoadedRecipe, group: int | None, stack: Stack | None) -> _Weights:
    """Give the inputs of a tensor with their weights: all experts, or the sources of its slice."""
    if stack is not None and group is not None:
        return stack.weights[group]
    return tuple((expert.name, expert.weight) for expert in loaded.recipe.experts)


def _choose(loaded: LoadedRecipe, indices: tuple[int, ...], weights: _Weights) -> _Chosen | list[Problem]:
    method = _method_of(loaded, indices)
    if not isinstance(method, GradedMethod):
        return method
    extract: ExtractSpec = loaded.recipe.extract
    problems = list(_check_directions(loaded, extract, ("extract",)))
    for index in indices:
        override = loaded.recipe.overrides[index]
        weights = tuple((name, (override.weights or {}).get(name, weight)) for name, weight in weights)
        if override.extract is not None:
            changed = override.extract.model_dump(exclude_none=True)
            # These tensors have a share of their own, so they take no part in the common one.
            alone = {"over": "tensor"} if {"density", "select"} & set(changed) else {}
            extract = _in_mode(extract, changed.get("mode")).model_copy(update=changed | alone)
            field = ("overrides", index, "extract")
            problems += _check_one_mode(loaded, changed.get("mode"), field)
            for fault in mode_faults(extract.mode, extract.dense, changed, extract.written_values):
                problems.append(Problem(loaded.place(*field), fault, "see `mode` under extract in the recipe's schema"))
            problems += _check_directions(loaded, extract, field)
    if problems:
        return problems
    return _Chosen(indices, method, resolve_extract(extract), weights)


def _check_one_mode(loaded: LoadedRecipe, mode: str | None, field: FieldPath) -> Iterator[Problem]:
    """Refuse adapters kept as they are beside experts stored in another way: no bundle holds both."""
    own = loaded.recipe.extract.mode
    if mode not in (None, own) and "factors" in (mode, own):
        message = f"mode '{mode}' beside mode '{own}': factors are kept of all tensors or of none"
        yield Problem(loaded.place(*field, "mode"), message, "set the mode under `extract` alone")


def _in_mode(extract: ExtractSpec, mode: str | None) -> ExtractSpec:
    """Set aside how values are stored where an override changes the mode: what it was is no answer for another one."""
    if mode in (None, extract.mode):
        return extract
    fields = {name: value for name, value in extract if name in extract.model_fields_set and name != "values"}
    return ExtractSpec.model_construct(**fields)


def _check_directions(loaded: LoadedRecipe, extract: ExtractSpec, field: tuple[str | int, ...]) -> Iterator[Problem]:
    n, wanted = len(loaded.recipe.experts), extract.directions
    if extract.mode == "basis" and (1 if wanted is None else wanted) >= n:
        message = f"{n} experts differ from their mean in at most {n - 1} directions"
        yield Problem(loaded.place(*field, "directions"), message, f"give at most {n - 1}")


def _method_of(loaded: LoadedRecipe, indices: Sequence[int]) -> GradedMethod | list[Problem]:
    """Resolve the method that is left when these overrides have been applied in their order."""
    spec = loaded.recipe.average
    name, preset, params = spec.method, spec.preset, spec.params
    home: FieldPath = ("average",)
    homes = _homes(params, home)
    for index in indices:
        average = loaded.recipe.overrides[index].average
        if average is None:
            continue
        field = ("overrides", index, "average")
        if average.names_method:
            name, preset, params, home, homes = average.method, average.preset, {}, field, {}
        params = _changed(params, average.params)
        homes |= _homes(average.params, field)

    def place(parameter: str, *rest: str | int) -> str:
        known = homes.get((parameter, *rest[:1]), homes.get((parameter,), home))
        return loaded.place(*known, parameter, *rest)

    return resolve_own(name, preset, params, place, _names(loaded))


def _homes(params: Mapping[str, Any], home: FieldPath) -> dict[FieldPath, FieldPath]:
    """Note where parameters stand, and what they say of single experts."""
    found: dict[FieldPath, FieldPath] = {(name,): home for name in params}
    mappings = {name: value for name, value in params.items() if isinstance(value, dict)}
    return found | {(name, expert): home for name, value in mappings.items() for expert in value}


def _changed(params: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """Change parameters; one with values by expert changes those of the experts that it names."""
    found = {**params, **change}
    for name, value in change.items():
        old = params.get(name)
        if isinstance(value, dict) and old is not None:
            found[name] = {**(old if isinstance(old, dict) else {OTHERS: old}), **value}
    return found


def _check_weights(loaded: LoadedRecipe, chosen: _Chosen, settings: TensorSettings, tensor: str) -> Problem | None:
    """Refuse weights that the method cannot take, where they were written."""
    wrong = _wrong_weights(settings)
    if wrong is None:
        return None
    setters = [index for index in chosen.indices if loaded.recipe.overrides[index].weights]
    place = loaded.place("overrides", setters[-1], "weights") if setters else loaded.place("experts")
    changing = setters or any(isinstance(weight, tuple) for _, weight in chosen.weights)
    where = f" on {tensor}" if changing else ""
    what, why, hint = wrong
    return Problem(place, f"{what}{where}, and {settings.average.method.name} {why}", hint)


def _wrong_weights(settings: TensorSettings) -> tuple[str, str, str] | None:
    """Say what is wrong with the weights of a tensor, why that matters to its method, and what to do."""
    method, params, weights = settings.average.method, settings.average.params, settings.weights
    if method.positive_weights and min(weights) <= 0:
        hint = "write each expert's own number, above zero, as its weight"
        return f"a weight is {min(weights):g}", "takes weights for measurements", hint
    if method.normalizes and method.normalizes(params) and abs(sum(weights)) < 1e-12:
        hint = "change a weight" + (" or set normalize: false" if "normalize" in params else "")
        return "the weights sum to zero", "divides by their sum", hint
    return None


def resolve_extract(extract: ExtractSpec) -> ResolvedExtract:
    """Fill the defaults in that depend on other fields."""
    if extract.mode == "sparse":
        return ResolvedExtract(extract.density, extract.over, extract.select, _rescale(extract), extract.values)
    whole = ResolvedExtract(1.0, "tensor", "magnitude", 1.0, extract.written_values or "bf16", extract.mode)
    if extract.mode == "emr":
        return replace(whole, scale=extract.scale or "elements")
    if extract.mode == "tall_mask":
        return replace(whole, mask_lambda=MASK_LAMBDA if extract.mask_lambda is None else extract.mask_lambda)
    if extract.mode == "basis":
        return replace(whole, directions=1 if extract.directions is None else extract.directions)
    return replace(whole, values="fp32" if extract.mode == "factors" else "sign")


def _rescale(extract: ExtractSpec) -> float:
    if isinstance(extract.rescale, bool):
        return 1 / extract.density if extract.rescale else 1.0
    if extract.rescale is not None:
        return extract.rescale
    # At random, the expectation is kept. The largest entries are more than their share of the delta; how much is lost
    # with the others was measured on the demo's experts.
    exponent = 1.0 if extract.select == "random" else BY_MAGNITUDE
    return float(extract.density**-exponent)
