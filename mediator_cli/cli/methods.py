"""`mediator methods`."""

from __future__ import annotations

import inspect as python_inspect
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mediator_cli.cli.options import JsonOption
from mediator_cli.cli.output import print_json, print_table, say

if TYPE_CHECKING:
    from mediator_cli.methods.registry import Method


def methods(
    name: Annotated[str | None, typer.Argument(help="One method, in detail.", show_default=False)] = None,
    as_json: JsonOption = False,
) -> None:
    """List the merge methods, or explain one: formula, parameters, presets, reference."""
    from mediator_cli.errors import MediatorError, Problem
    from mediator_cli.methods.registry import get_method
    from mediator_cli.methods.registry import methods as all_methods

    if name is None:
        _list(all_methods(), as_json)
        return
    try:
        method = get_method(name)
    except KeyError as error:
        raise MediatorError(Problem("", f"unknown merge method '{name}'", str(error.args[0]))) from None
    if as_json:
        print_json(describe(method))
    else:
        _explain(method)


def describe(method: Method) -> dict[str, Any]:
    """Gather all that is known of a method."""
    return {
        "name": method.name,
        "summary": method.summary,
        "reference": method.reference,
        "space": method.space,
        "scope": method.scope,
        "random": method.random,
        "statistics": [statistic.name for statistic in method.statistics],
        "presets": {name: dict(values) for name, values in method.presets.items()},
        "parameters": method.schema.model_json_schema().get("properties", {}),
        "text": python_inspect.getdoc(method.function),
    }


def _list(known: dict[str, Method], as_json: bool) -> None:
    if as_json:
        print_json([describe(method) for method in known.values()])
        return
    rows = [(m.name, m.summary, m.space, ", ".join(m.presets), m.reference) for m in known.values()]
    print_table(("method", "what it does", "works on", "presets", "reference"), rows)
    say("Next: mediator methods NAME")


def _explain(method: Method) -> None:
    text = (python_inspect.getdoc(method.function) or "").split(">>>")[0].strip()
    say(f"{method.name}\n\n{text}\n")
    rows = [(name, *parameter_cells(facts)) for name, facts in describe(method)["parameters"].items()]
    print_table(("parameter", "values", "default", "meaning"), rows)
    for preset, values in method.presets.items():
        say(f"preset {preset}: " + (", ".join(f"{k}={v}" for k, v in values.items()) or "the defaults"))
    fewest, most = method.n_inputs
    say(f"experts: {fewest if fewest == most else f'{fewest} or more'} · works on {method.space}s · {method.reference}")


def parameter_cells(facts: dict[str, Any]) -> tuple[str, str, str]:
    """Write values, default and meaning of one parameter of a method."""
    if "enum" in facts:
        values = " | ".join(str(value) for value in facts["enum"])
    else:
        low = facts.get("minimum", facts.get("exclusiveMinimum"))
        high = facts.get("maximum", facts.get("exclusiveMaximum"))
        open_low = "(" if "exclusiveMinimum" in facts else "["
        values = facts["type"] if low is None and high is None else f"{facts['type']} in {open_low}{low}, {high}]"
    return values, str(facts.get("default", "required")), facts.get("description", "")
