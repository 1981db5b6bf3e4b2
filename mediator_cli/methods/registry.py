"""The contract of a merge method: its signature is its schema, its decorator says how to stream it.

A method is a pure function of slabs as numpy arrays. Two positional arguments: `deltas [n, m]` (space `delta`)
or `tensors [n, m]` (space `weight`) in float32, and `weights [n]` in float64. Its keyword-only arguments are, by name:
statistics that it declares, `uniforms [n, m]` if it is random, `base [m]` if it `needs_base`, `moments [n, m]`, the
experts' second moments, if it `needs_moments`, and everything else is a parameter of the recipe.
It gives float32 [m] and never changes what it is given.

A method that declares a `view` has the scope of matrices: it is given each matrix whole, `[n, rows, columns]`, one at
a time, and gives `[rows, columns]`; of a 3-D tensor each slice is a matrix. All other tensors, and matrices that the
view leaves to elements, come as slabs `[n, m]`, and the method merges them entry by entry.

A method of space `adapter` merges low-rank factors and gives an adapter: `adapters`, a sequence of `Factors` of one
matrix, and `weights [n]`, to `Factors`. It declares neither view nor statistics; `uniforms`, if it is random, is a
function.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

import mediator_cli.methods as package
from mediator_cli.errors import Problem, did_you_mean
from mediator_cli.kernels.arrays import Floats
from mediator_cli.methods.method import Method, ResolvedMethod
from mediator_cli.methods.statistics import Params, Space

_NO_METHODS = ("registry", "method", "statistics")
_REGISTERED: dict[str, Method] = {}


def merge_method(
    *,
    space: Space | Callable[[Params], Space],
    reference: str,
    **facts: Any,  # noqa: ANN401 - Method's own fields
) -> Callable[..., Any]:
    """Register a function as a merge method under its own name; `facts` are fields of Method."""

    def register(function: Callable[..., Floats]) -> Callable[..., Floats]:
        names = {statistic.name for statistic in (*facts.get("statistics", ()), *facts.get("rows", ()))}
        schema = _schema_of(function, names | {"uniforms", "base", "moments"})
        _REGISTERED[function.__name__] = Method(function.__name__, function, space, reference, schema, **facts)
        return function

    return register


def _schema_of(function: Callable[..., Any], not_parameters: set[str]) -> type[BaseModel]:
    hints = typing.get_type_hints(function, include_extras=True)
    fields: dict[str, Any] = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.name not in not_parameters:
            fields[parameter.name.rstrip("_")] = (hints[parameter.name], parameter.default)
    return create_model(function.__name__, __config__=ConfigDict(extra="forbid", strict=True, frozen=True), **fields)


def methods() -> dict[str, Method]:
    """Return all methods by name: those of this package, then those of installed packages."""
    for module in iter_modules(package.__path__):
        if not module.name.startswith("_") and module.name not in _NO_METHODS:
            import_module(f"{package.__name__}.{module.name}")
    for point in entry_points(group="mediator_cli.methods"):
        point.load()
    return dict(sorted(_REGISTERED.items()))


def get_method(name: str) -> Method:
    """Return a method by name; raise KeyError with a suggestion when there is none."""
    known = methods()
    if name not in known:
        raise KeyError(did_you_mean(name, known))
    return known[name]


def resolve_method(
    name: str, preset: str | None, given: Params, place: Callable[[str], str]
) -> ResolvedMethod | list[Problem]:
    """Check method, preset and parameters; give the resolved method or all that is wrong with them.

    `place` turns the name of a field into where the user wrote it.
    """
    known = methods()
    if name not in known:
        return [Problem(place("method"), f"unknown merge method '{name}'", did_you_mean(name, known))]
    method = known[name]
    presets = {"paper": {}, **method.presets}
    if preset is not None and preset not in presets:
        return [Problem(place("preset"), f"{name} has no preset '{preset}'", did_you_mean(preset, presets))]
    values = {**presets[preset or "paper"], **given}
    try:
        params = method.schema.model_validate(values).model_dump()
    except ValidationError as error:
        return [_parameter_problem(method, place, item) for item in error.errors(include_url=False)]
    wrong = method.check(params) if method.check else None
    return [replace(wrong, place=place(wrong.place))] if wrong else ResolvedMethod(method, params)


def _parameter_problem(method: Method, place: Callable[[str], str], item: Any) -> Problem:  # noqa: ANN401 - pydantic's dict
    name = str(item["loc"][0])
    if item["type"] == "extra_forbidden":
        known = list(method.schema.model_fields)
        hint = did_you_mean(name, known) if known else f"{method.name} takes no parameters"
        return Problem(place(name), f"{method.name} has no parameter '{name}'", hint)
    if item["type"] == "missing":
        return Problem(place(name), f"{method.name} needs '{name}'", f"see `mediator methods {method.name}`")
    message = item["msg"][0].lower() + item["msg"][1:]
    return Problem(place(name), f"{message} (got {item['input']!r})", f"see `mediator methods {method.name}`")
