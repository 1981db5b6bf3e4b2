"""The forms of a configuration (models, slices, modules) as one: parts, each merged of inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mediator_cli.errors import did_you_mean
from mediator_cli.recipe.mergekit.methods import IGNORED, KNOWN
from mediator_cli.recipe.mergekit.settings import Scope

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from mediator_cli.errors import Problem
    from mediator_cli.recipe.mergekit.source import FieldPath, Source

_FORMS = ("models", "slices", "modules")
_HINTS = {"models": "- model: PATH", "slices": "- sources: [{model: PATH, layer_range: [0, 8]}]"}
_MODEL_KEYS = ("model", "parameters")
_SOURCE_KEYS = (*_MODEL_KEYS, "layer_range")
_SLICE_KEYS = ("sources", "base_model", "parameters")
_MODULE_KEYS = ("slices", "models", "parameters")
_REFERENCE_KEYS = ("model", "lora")


@dataclass(frozen=True)
class Input:
    """One model of a part, the range of its layers if it has one, its own parameters, and where it stands."""

    model: str
    layers: tuple[int, int] | None
    scope: Scope
    at: FieldPath


@dataclass(frozen=True)
class Part:
    """What is merged of the same models: a slice, or all; `scopes` are those of all inputs, nearest first."""

    inputs: tuple[Input, ...]
    base: str | None
    scopes: tuple[Scope, ...]
    at: FieldPath


def reference_of(value: Any) -> str | None:  # noqa: ANN401 - YAML data
    """Read a model as text, `PATH[@REVISION][+ADAPTER]`; None if it is none.

    >>> reference_of({"model": {"path": "org/x", "revision": "v1"}, "lora": "./l"})
    'org/x@v1+./l'
    """
    if isinstance(value, str):
        return value or None
    if not isinstance(value, dict):
        return None
    if "path" in value:
        path, revision = value["path"], value.get("revision")
        return f"{path}@{revision}" if revision else str(path)
    model, lora = reference_of(value.get("model")), reference_of(value.get("lora"))
    return f"{model}+{lora}" if model and lora else model


def read_parts(source: Source) -> tuple[list[Part], list[Problem]]:
    """Read all parts; give them, and all that is wrong with their form."""
    problems = list(_check_form(source))
    if problems:
        return [], problems
    form = next(form for form in _FORMS if source.data.get(form))
    data: Mapping[str, Any] = source.data
    at: FieldPath = ()
    scopes: tuple[Scope, ...] = (_scope(data, at),)
    if form == "modules":
        name = next(iter(data["modules"]))
        data, at = data["modules"][name], ("modules", name)
        form = "slices" if data.get("slices") else "models"
        scopes = (_scope(data, at), *scopes)
    base = reference_of(source.data.get("base_model"))
    if form == "models":
        problems = list(_check_inputs(source, data["models"], (*at, "models"), _MODEL_KEYS))
        return ([] if problems else [Part(_inputs(data["models"], (*at, "models")), base, scopes, at)]), problems
    parts = []
    for index, entry in enumerate(data["slices"]):
        place = (*at, "slices", index)
        faults = list(_check_slice(source, entry, place))
        problems += faults
        if not faults:
            own = reference_of(entry.get("base_model")) or base
            inputs = _inputs(entry["sources"], (*place, "sources"))
            parts.append(Part(inputs, own, (_scope(entry, place), *scopes), place))
    return parts, problems


def _scope(data: Mapping[str, Any], at: FieldPath) -> Scope:
    return Scope(data.get("parameters") or {}, (*at, "parameters"))


def _inputs(entries: list[dict[str, Any]], at: FieldPath) -> tuple[Input, ...]:
    found = []
    for index, entry in enumerate(entries):
        layers = entry.get("layer_range")
        model = reference_of(entry["model"]) or ""
        found.append(Input(model, tuple(layers) if layers else None, _scope(entry, (*at, index)), (*at, index)))
    return tuple(found)


def _check_form(source: Source) -> Iterator[Problem]:
    given = [form for form in _FORMS if source.data.get(form)]
    if len(given) != 1:
        said = f"has {' and '.join(given)}" if given else "lists no models"
        at: FieldPath = (given[1],) if given else next(((form,) for form in _FORMS if form in source.data), ())
        yield source.problem(at, said, f"write one of {', '.join(_FORMS)}")
    for key in ("parameters",):
        yield from _check_mapping(source, source.data.get(key), (key,))
    if "base_model" in source.data and source.data["base_model"] and not reference_of(source.data["base_model"]):
        yield source.problem(("base_model",), "names no model", "write `base_model: PATH`")
    modules = source.data.get("modules")
    if modules and len(given) == 1:
        yield from _check_modules(source, modules)
    elif len(given) == 1:
        yield from _check_list(source, source.data[given[0]], (given[0],))


def _check_modules(source: Source, modules: Any) -> Iterator[Problem]:  # noqa: ANN401 - YAML data
    if not isinstance(modules, dict):
        yield source.problem(("modules",), "is no mapping", "write `modules: {NAME: {models: [...]}}`")
        return
    if len(modules) > 1:
        names = ", ".join(modules)
        message = f"mergekit's modules {names} are merged each in its own way, which has no counterpart here"
        yield source.problem(("modules",), message, "use a recipe with `overrides`, or `keep_base` for one of them")
        return
    for name, module in modules.items():
        at = ("modules", name)
        if not isinstance(module, dict) or bool(module.get("slices")) == bool(module.get("models")):
            yield source.problem(at, "has neither slices nor models, or both", "give one of them")
            continue
        yield from _unknown(source, module, _MODULE_KEYS, at)
        yield from _check_mapping(source, module.get("parameters"), (*at, "parameters"))
        form = "slices" if module.get("slices") else "models"
        yield from _check_list(source, module[form], (*at, form))


def _check_list(source: Source, entries: Any, at: FieldPath) -> Iterator[Problem]:  # noqa: ANN401 - YAML data
    if not isinstance(entries, list):
        yield source.problem(at, "is no list", f"write `{_HINTS[str(at[-1])]}`")


def _check_mapping(source: Source, value: Any, at: FieldPath) -> Iterator[Problem]:  # noqa: ANN401 - YAML data
    if value is not None and not isinstance(value, dict):
        yield source.problem(at, "is no mapping", "write `parameters: {NAME: VALUE}`")


def _check_slice(source: Source, entry: Any, at: FieldPath) -> Iterator[Problem]:  # noqa: ANN401 - YAML data
    if not isinstance(entry, dict) or not isinstance(entry.get("sources"), list) or not entry["sources"]:
        yield source.problem(at, "names no sources", f"write `{_HINTS['slices']}`")
        return
    yield from _unknown(source, entry, _SLICE_KEYS, at)
    yield from _check_mapping(source, entry.get("parameters"), (*at, "parameters"))
    faults = list(_check_inputs(source, entry["sources"], (*at, "sources"), _SOURCE_KEYS))
    yield from faults
    if faults:
        return
    for index, item in enumerate(entry["sources"]):
        layers = item.get("layer_range")
        if not (isinstance(layers, list) and len(layers) == 2 and all(type(n) is int and n >= 0 for n in layers)):
            place = (*at, "sources", index, "layer_range")
            yield source.problem(place, "is no range of layers", "write `layer_range: [0, 8]` for layers 0 to 7")
        elif layers[0] >= layers[1]:
            place = (*at, "sources", index, "layer_range")
            yield source.problem(place, f"{layers} holds no layer", "the end is not in it")


def _check_inputs(source: Source, entries: Any, at: FieldPath, keys: tuple[str, ...]) -> Iterator[Problem]:  # noqa: ANN401
    seen: set[str] = set()
    for index, entry in enumerate(entries):
        model = reference_of(entry.get("model")) if isinstance(entry, dict) else None
        if model is None:
            yield source.problem((*at, index), "names no model", "write `- model: PATH`")
            continue
        if model in seen:
            yield source.problem((*at, index, "model"), f"'{model}' is listed twice", "give it one weight")
        seen.add(model)
        yield from _unknown(source, entry, keys, (*at, index))
        yield from _check_mapping(source, entry.get("parameters"), (*at, index, "parameters"))
        if isinstance(entry["model"], dict) and "path" not in entry["model"]:
            yield from _unknown(source, entry["model"], _REFERENCE_KEYS, (*at, index, "model"))


def _unknown(source: Source, data: Mapping[str, Any], known: tuple[str, ...], at: FieldPath) -> Iterator[Problem]:
    for key in data:
        if key not in (*known, *KNOWN, *IGNORED):
            yield source.problem((*at, key), f"unknown key '{key}'", did_you_mean(str(key), known))
