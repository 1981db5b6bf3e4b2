"""The JSON schema of a recipe with the parameters of every merge method in it, for editors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mediator_cli.methods.method import Method
from mediator_cli.methods.registry import methods
from mediator_cli.recipe.collections import ExpertsFrom
from mediator_cli.recipe.schema import Recipe

if TYPE_CHECKING:
    from collections.abc import Iterable


def recipe_schema() -> dict[str, Any]:
    """Compose the recipe's schema with those of all registered methods."""
    schema = Recipe.model_json_schema()
    defs = schema["$defs"]
    known = methods()
    defs["AverageSpec"] = {
        "description": "A merge method and its parameters.",
        "oneOf": [{"$ref": f"#/$defs/average_{name}"} for name in known],
    }
    for name, method in known.items():
        defs[f"average_{name}"] = _average(method)
    defs["average_change"] = _change(known.values())
    for name in ("OverrideSpec", "SliceOverride", "SliceSpec"):
        in_overrides = defs[name]["properties"]["average"]
        in_overrides["anyOf"] = [{"$ref": "#/$defs/AverageSpec"}, {"$ref": "#/$defs/average_change"}]
    defs["ExpertsFrom"] = ExpertsFrom.model_json_schema()
    schema["properties"]["experts"] = _listed(schema["properties"]["experts"])
    defs["DenoiseSpec"] = {"anyOf": [{"const": "none"}, defs["DenoiseSpec"]]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "mediator recipe", **schema}


def _listed(experts: dict[str, Any]) -> dict[str, Any]:
    """Allow a folder or collection of experts beside single ones, and in the place of the list."""
    source, about = {"$ref": "#/$defs/ExpertsFrom"}, {key: experts[key] for key in experts if key != "type"}
    form = {"if": {"type": "object"}, "then": source, "else": {"type": "array"}}
    return {**about, "items": {"anyOf": [experts["items"], source]}, **form}


def _average(method: Method) -> dict[str, Any]:
    own = method.schema.model_json_schema()
    chosen: dict[str, Any] = {"const": method.name, "description": method.summary}
    properties: dict[str, Any] = {"method": chosen, "preset": {"enum": ["paper", *method.presets]}}
    # linear is the default, so a recipe may leave the method out.
    required = [] if method.name == "linear" else ["method"]
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {**properties, **_parameters(method)},
        "required": [*required, *own.get("required", [])],
    }


def _change(known: Iterable[Method]) -> dict[str, Any]:
    """Describe parameters without a method: those of any, since the method that applies is not known here."""
    found: dict[str, list[dict[str, Any]]] = {}
    for method in known:
        for name, parameter in _parameters(method).items():
            plain = {key: value for key, value in parameter.items() if key not in ("default", "title")}
            found.setdefault(name, [])
            found[name] += [] if plain in found[name] else [plain]
    return {
        "type": "object",
        "description": "Parameters alone: the method that applies to these tensors stays.",
        "additionalProperties": False,
        "properties": {name: forms[0] if len(forms) == 1 else {"anyOf": forms} for name, forms in found.items()},
        "minProperties": 1,
    }


def _parameters(method: Method) -> dict[str, Any]:
    own = method.schema.model_json_schema().get("properties", {})
    graded = {
        name: _graded(parameter) if parameter.get("type") == "number" else parameter for name, parameter in own.items()
    }
    return {name: _own(form) if name in method.per_expert else form for name, form in graded.items()}


def _own(parameter: dict[str, Any]) -> dict[str, Any]:
    """Allow values by expert where experts may differ in a number."""
    forms = parameter["anyOf"]
    return {**parameter, "anyOf": [*forms, {"type": "object", "additionalProperties": {"anyOf": forms}}]}


def _graded(parameter: dict[str, Any]) -> dict[str, Any]:
    """Allow a list of anchors over the layers where a number may stand."""
    about = ("title", "description", "default")
    number = {key: value for key, value in parameter.items() if key not in about}
    anchors = {"type": "array", "items": number, "minItems": 1}
    return {**{key: parameter[key] for key in about if key in parameter}, "anyOf": [number, anchors]}
