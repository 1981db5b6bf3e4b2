"""The JSON schema of a recipe with the parameters of every merge method in it, for editors."""

from __future__ import annotations

from typing import Any

from mediator_cli.methods.registry import Method, methods
from mediator_cli.recipe.schema import Recipe


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
    defs["DenoiseSpec"] = {"anyOf": [{"const": "none"}, defs["DenoiseSpec"]]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "mediator recipe", **schema}


def _average(method: Method) -> dict[str, Any]:
    own = method.schema.model_json_schema()
    chosen: dict[str, Any] = {"const": method.name, "description": method.summary}
    properties: dict[str, Any] = {"method": chosen, "preset": {"enum": ["paper", *method.presets]}}
    # linear is the default, so a recipe may leave the method out.
    required = [] if method.name == "linear" else ["method"]
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {**properties, **own.get("properties", {})},
        "required": [*required, *own.get("required", [])],
    }
