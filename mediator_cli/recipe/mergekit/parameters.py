"""Parameters of a configuration as those of a method here: for all tensors, or by overrides where they have filters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mediator_cli.errors import did_you_mean
from mediator_cli.recipe.mergekit.methods import (
    COUNTERPARTS,
    IGNORED,
    KNOWN,
    UNUSED,
    fault_of,
    per_model,
    translated,
    vectors_of,
)
from mediator_cli.recipe.mergekit.models import merged_inputs
from mediator_cli.recipe.mergekit.settings import Setting, chain, glob_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mediator_cli.errors import Problem
    from mediator_cli.recipe.mergekit.forms import Input, Part
    from mediator_cli.recipe.mergekit.models import Names
    from mediator_cli.recipe.mergekit.settings import Scope
    from mediator_cli.recipe.mergekit.source import Draft, FieldPath

_VECTORS = ("nuslerp_flatten", "nuslerp_row_wise")


@dataclass(frozen=True)
class _Target:
    """Where the settings of a part go: the recipe itself, or one of its slices; and the inputs by name."""

    draft: Draft
    data: dict[str, Any]
    at: FieldPath
    inputs: tuple[tuple[Input, str], ...]

    @property
    def method(self) -> str:
        return self.draft.source.method

    def set(self, setting: Setting, inner: FieldPath, value: Any) -> None:  # noqa: ANN401 - YAML data
        """Set a field for all tensors, or by an override for the names that the setting's filter finds.

        `inner` is where the value stands, such as (average, density).
        """
        if setting.filter is None:
            _put(self.data, inner, value)
            self.draft.copy_lines(setting.value_at, (*self.at, *inner))
            return
        overrides = self.data.setdefault("overrides", [])
        overrides.append({"match": glob_of(setting.filter), "optional": True})
        _put(overrides[-1], inner, value)
        place = (*self.at, "overrides", len(overrides) - 1)
        self.draft.copy_lines((*setting.at, "filter"), (*place, "match"))
        self.draft.copy_lines(setting.value_at, (*place, *inner))


def _put(data: dict[str, Any], inner: FieldPath, value: Any) -> None:  # noqa: ANN401 - YAML data
    for part in inner[:-1]:
        data = data.setdefault(str(part), {})
    data[str(inner[-1])] = value


def check_parameters(draft: Draft, parts: Sequence[Part]) -> Iterator[Problem]:
    """Refuse names that no method of mergekit takes, and tell of those that this one ignores."""
    method = draft.source.method
    common = dict.fromkeys(scope.at for part in parts for scope in part.scopes)
    scopes = {scope.at: scope for part in parts for scope in (*(each.scope for each in part.inputs), *part.scopes)}
    for at, scope in scopes.items():
        for key in scope.values:
            yield from _check_name(draft, scope, str(key), method, own=at not in common)


def tell_misplaced(draft: Draft, value: Any, at: FieldPath) -> None:  # noqa: ANN401 - YAML data
    """Tell of parameters that stand outside `parameters`, and of what only mergekit has a use for."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            tell_misplaced(draft, item, (*at, index))
    if not isinstance(value, dict):
        return
    for key, item in value.items():
        if key in IGNORED:
            draft.notice((*at, key), f"'{key}' has no effect here")
        elif key in KNOWN:
            draft.notice((*at, key), f"'{key}' stands outside `parameters`; it has no effect, as in mergekit")
        elif key not in ("parameters", "tokenizer"):
            tell_misplaced(draft, item, (*at, str(key)))


def _check_name(draft: Draft, scope: Scope, key: str, method: str, *, own: bool) -> Iterator[Problem]:
    counterpart, at = COUNTERPARTS[method], (*scope.at, key)
    takes = per_model(method) if own else counterpart.takes
    if key in IGNORED:
        draft.notice(at, f"'{key}' has no effect here")
    elif key not in KNOWN:
        hint = did_you_mean(key, takes) if takes else f"{method} takes none"
        yield draft.source.problem(at, f"{method} takes no '{key}'", hint)
    elif key in UNUSED and key in takes:
        draft.notice(at, f"'{key}' changes no result, and is left out")
    elif key in counterpart.without_effect or key not in takes:
        where = " of a model" if own and key in counterpart.takes else ""
        draft.notice(at, f"{method} takes no '{key}'{where}; it has no effect, as in mergekit")


def write_part(draft: Draft, names: Names, part: Part, index: int | None) -> Iterator[Problem]:
    """Write what is merged and how: into the recipe itself, or as its slice number `index`."""
    target = _target(draft, names, part, index)
    counterpart = COUNTERPARTS[draft.source.method]
    target.data["average"] = {"method": target.method, **dict(counterpart.defaults)}
    if counterpart.base == "origin_if_any":
        target.data["average"]["space"] = "weight" if part.base is None else "delta"
    draft.copy_lines(("merge_method",), (*target.at, "average", "method"))
    own = per_model(target.method)
    taken = [key for key in counterpart.takes if key not in (*UNUSED, *counterpart.without_effect, *_VECTORS)]
    for key in taken:
        if key == "weight":
            yield from _write_weights(target, part)
        elif key in own:
            yield from _write_per_model(target, part, key)
        else:
            yield from _write(target, key, chain(part.scopes, key))
    yield from _write_vectors(target, part)


def _target(draft: Draft, names: Names, part: Part, index: int | None) -> _Target:
    source = draft.source
    inputs = tuple((each, names.known[each.model]) for each in merged_inputs(source, part))
    if index is None:
        return _Target(draft, draft.data, (), inputs)
    spec: dict[str, Any] = {"sources": [_slice_source(each, name) for each, name in inputs]}
    base = next((each for each in part.inputs if each.model == part.base), None)
    if base is not None and COUNTERPARTS[source.method].base in ("origin", "origin_if_any"):
        spec["base"] = _range(base)
    draft.data.setdefault("slices", []).append(spec)
    at: FieldPath = ("slices", index)
    draft.copy_lines(part.at, at)
    for number, (each, _) in enumerate(inputs):
        place = (*at, "sources", number)
        draft.copy_lines(each.at, place)
        draft.copy_lines((*each.at, "layer_range"), (*place, "layers"))
        draft.copy_lines((*each.at, "model"), (*place, "source"))
    return _Target(draft, spec, at, inputs)


def _slice_source(each: Input, name: str) -> dict[str, Any]:
    return {"source": name, "layers": _range(each)}


def _range(each: Input) -> str:
    first, end = each.layers or (0, 1)
    return f"{first}-{end - 1}"


def _write_weights(target: _Target, part: Part) -> Iterator[Problem]:
    for number, (each, name) in enumerate(target.inputs):
        found = chain((each.scope, *part.scopes), "weight")
        if not found and each.at == ("base_model",):
            message = f"{target.method} merges base_model too, and gives it no weight"
            hint = "list it under models with its weight, or leave base_model out"
            yield target.draft.source.problem(("base_model",), message, hint)
        for setting in reversed(found):
            inner: FieldPath = ("weights", name)
            if setting.filter is None:
                key = "sources" if target.at else "experts"
                target.data[key][number]["weight"] = setting.value
                target.draft.copy_lines(setting.value_at, (*target.at, key, number, "weight"))
            else:
                target.set(setting, inner, setting.value)


def _write_per_model(target: _Target, part: Part, key: str) -> Iterator[Problem]:
    """Write what each model may have for itself: once where all have the same, else by their names."""
    chains = [(name, chain((each.scope, *part.scopes), key)) for each, name in target.inputs]
    first = [(setting.filter, setting.value) for setting in chains[0][1]]
    if all([(setting.filter, setting.value) for setting in found] == first for _, found in chains):
        yield from _write(target, key, chains[0][1])
        return
    for name, found in chains:
        for setting in reversed(found):
            target.set(setting, ("average", key, name), setting.value)


def _write(target: _Target, key: str, settings: list[Setting]) -> Iterator[Problem]:
    for setting in reversed(settings):
        if fault := fault_of(key, setting.value):
            yield target.draft.source.problem(setting.value_at, fault, "write true or false")
            continue
        name, value = translated(target.method, key, setting.value)
        target.set(setting, ("average", name), value)


def _write_vectors(target: _Target, part: Part) -> Iterator[Problem]:
    """Write what nuslerp takes as one vector, which two of its switches say together."""
    if _VECTORS[0] not in COUNTERPARTS[target.method].takes:
        return
    found = {key: chain(part.scopes, key) for key in _VECTORS}
    for key, settings in found.items():
        for setting in settings:
            fault = fault_of(key, setting.value)
            if fault or setting.filter is not None:
                message = fault or f"'{key}' has a filter, which has no counterpart here"
                yield target.draft.source.problem(setting.at, message, "write true or false")
                return
    flatten, columns = (bool(found[key][0].value) if found[key] else key == _VECTORS[0] for key in _VECTORS)
    if any(found.values()):
        target.data["average"]["over"] = vectors_of(flatten, columns)
        place = next(settings[0].value_at for settings in found.values() if settings)
        target.draft.copy_lines(place, (*target.at, "average", "over"))
