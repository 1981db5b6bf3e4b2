"""Merge fine-tuned language models: average the layers that agree, route the layers that fight.

The whole of it in two lines: `merge(make_plan(load_recipe(Path("recipe.yaml"))))` makes a bundle, and
`open_bundle(folder)` opens it to answer. Names load on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mediator_cli.bundle.read import Bundle, read_bundle
    from mediator_cli.bundle.verify import verify_bundle
    from mediator_cli.errors import MediatorError
    from mediator_cli.methods.registry import merge_method
    from mediator_cli.pipeline.merge import merge
    from mediator_cli.pipeline.settings import Settings
    from mediator_cli.pipeline.survey import analyze_conflicts
    from mediator_cli.plan.make import make_plan
    from mediator_cli.recipe.load import load_recipe
    from mediator_cli.runtime.model import RoutedModel
    from mediator_cli.runtime.open import open_bundle

_PLACES = {
    "Bundle": "bundle.read",
    "MediatorError": "errors",
    "RoutedModel": "runtime.model",
    "Settings": "pipeline.settings",
    "analyze_conflicts": "pipeline.survey",
    "load_recipe": "recipe.load",
    "make_plan": "plan.make",
    "merge": "pipeline.merge",
    "merge_method": "methods.registry",
    "open_bundle": "runtime.open",
    "read_bundle": "bundle.read",
    "verify_bundle": "bundle.verify",
}
__all__ = [
    "Bundle", "MediatorError", "RoutedModel", "Settings", "analyze_conflicts", "load_recipe", "make_plan", "merge",
    "merge_method", "open_bundle", "read_bundle", "verify_bundle",
]  # fmt: skip


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever the name stands for
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
