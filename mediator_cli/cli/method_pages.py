"""What there is to say of each merge method, from docstring, signature and facts; terminal and docs show the same."""

from __future__ import annotations

import inspect
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import yaml

from mediator_cli.engine.statistics import passes_of
from mediator_cli.methods.method import ResolvedMethod
from mediator_cli.methods.registry import resolve_method

if TYPE_CHECKING:
    from mediator_cli.methods.method import Method

_HEADS = {
    "Apt when": "apt",
    "Not apt when": "not_apt",
    "Elsewhere:": "elsewhere",
    "Cost:": "cost",
    "Uncertain:": "uncertain",
}
"""How the paragraphs of a docstring begin that have a place of their own on a page."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method, in words."""

    name: str
    values: str
    default: str
    meaning: str


@dataclass(frozen=True)
class MethodPage:
    """A method's page: `formula` has the paragraphs that say what is computed; the others may be empty.

    `passes` is how often the sources of four experts are read, at the defaults. `properties` are the JSON schemas of
    the parameters.
    """

    name: str
    summary: str
    formula: str
    apt: str
    not_apt: str
    elsewhere: str
    cost: str
    uncertain: str
    works_on: str
    scope: str
    passes: int
    needs: str
    parameters: tuple[Parameter, ...]
    properties: dict[str, Any]
    presets: dict[str, dict[str, Any]]
    example: str
    reference: str

    @property
    def sections(self) -> tuple[tuple[str, str], ...]:
        """All paragraphs in the order of the page, each with its heading if it does not say itself what it is."""
        plain = [("", self.formula), ("", self.apt), ("", self.not_apt)]
        named = [("Elsewhere", self.elsewhere), ("Cost", self.cost), ("Uncertain", self.uncertain)]
        return tuple((head, text) for head, text in (*plain, *named) if text)

    def as_json(self) -> dict[str, Any]:
        """Give the page as JSON, the parameters by name with their JSON schemas."""
        facts = asdict(self)
        return facts | {"parameters": facts.pop("properties")}


def cost_in_words(page: MethodPage) -> str:
    """Say in few words what a method costs: passes over the sources, and linear algebra where it sees matrices."""
    if page.works_on == "adapters":
        return "factors alone"
    passes = f"{page.passes} pass{'es' * (page.passes != 1)}"
    return f"{passes}, matrices" if page.scope == "matrix" else passes


def page_of(method: Method) -> MethodPage:
    """Gather all that is known of a method."""
    parts = _parts(inspect.getdoc(method.function) or "")
    properties = method.schema.model_json_schema().get("properties", {})
    return MethodPage(
        name=method.name,
        summary=method.summary,
        works_on=method.works_on,
        scope=scope_of(_default(method)),
        passes=passes_of(_default(method), 4),
        needs=needs_of(method),
        parameters=tuple(_parameter(name, facts) for name, facts in properties.items()),
        properties=properties,
        presets={name: dict(values) for name, values in method.presets.items()},
        example=example_of(method),
        reference=method.reference,
        **parts,
    )


def _default(method: Method) -> ResolvedMethod:
    found = resolve_method(method.name, None, {}, str)
    if not isinstance(found, ResolvedMethod):
        raise TypeError(f"{method.name} does not take its own defaults")
    return found


def _parts(text: str) -> dict[str, str]:
    """Sort the paragraphs behind the first line by how they begin."""
    found = dict.fromkeys(["formula", *_HEADS.values()], "")
    for paragraph in text.split(">>>")[0].strip().split("\n\n")[1:]:
        head = next((head for head in _HEADS if paragraph.startswith(head)), None)
        name = _HEADS[head] if head else "formula"
        body = paragraph.removeprefix(head).strip() if head and head.endswith(":") else paragraph
        found[name] = f"{found[name]}\n\n{body}".strip()
    return found


def scope_of(resolved: ResolvedMethod) -> str:
    """Say what the method has to know before it merges an entry: nothing else, its row, tensor, matrix, the model."""
    if resolved.method.space == "adapter" or resolved.view_of((2, 2), "linear") != "elements":
        return "matrix"
    overs = {statistic.over(resolved.params) for statistic in resolved.needed_statistics()}
    widest = "model" if "model" in overs else "tensor" if overs else "element"
    return "row" if widest == "element" and resolved.needs_rows else widest


def needs_of(method: Method) -> str:
    """Say what a recipe has to give: how many experts, and what else."""
    fewest, most = method.n_inputs
    experts = f"{fewest} expert{'s' * (fewest != 1)}" if fewest == most else f"{fewest}+ experts"
    extras = {"a base": method.space == "delta" or method.needs_base, "second moments": method.needs_moments}
    extras |= {"adapters": method.space == "adapter", "random numbers": method.random}
    return ", ".join([experts, *(name for name, is_needed in extras.items() if is_needed)])


def example_of(method: Method) -> str:
    """Write a recipe that merges with a method at its defaults."""
    fewest, most = method.n_inputs
    n = max(fewest, min(2, most or 2))
    params = {name: value for name, value in _default(method).params.items() if value is not None}
    recipe = {
        "version": 1,
        "base": "./base",
        "experts": [{"name": f"expert{at}", "model": f"./expert{at}"} for at in range(1, n + 1)],
        "assign": {"rule": "none"},
        "average": {"method": method.name, **params},
        "output": {"path": "./merged"},
    }
    if method.needs_moments:
        for expert in recipe["experts"]:  # type: ignore[attr-defined]
            expert["second_moments"] = f"{expert['model']}/moments"
    text: str = yaml.safe_dump(recipe, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True)
    return text


def _parameter(name: str, facts: dict[str, Any]) -> Parameter:
    default = "required" if "default" not in facts else str(facts["default"])
    return Parameter(name, _values(facts), default, facts.get("description", ""))


def _values(facts: dict[str, Any]) -> str:
    """Write what a parameter may be: names, a type, a range whose ends are included or not.

    >>> _values({"type": "number", "exclusiveMinimum": 0, "maximum": 1}), _values({"type": "integer", "minimum": 1})
    ('number in (0, 1]', 'integer, 1 or more')
    >>> _values({"anyOf": [{"type": "integer", "minimum": 0}, {"type": "null"}]})
    'integer, 0 or more, or null'
    """
    if "anyOf" in facts:
        *some, last = [_values(option) for option in facts["anyOf"]]
        return f"{', or '.join(some)}, or {last}" if some else last
    if "enum" in facts:
        return " | ".join(str(value) for value in facts["enum"])
    if "const" in facts:
        return str(facts["const"])
    kind = facts.get("type", "any")
    low, high = (facts.get(f"exclusive{end}", facts.get(end.lower())) for end in ("Minimum", "Maximum"))
    open_low, open_high = "exclusiveMinimum" in facts, "exclusiveMaximum" in facts
    if low is None and high is None:
        return str(kind)
    if high is None:
        return f"{kind} above {low}" if open_low else f"{kind}, {low} or more"
    if low is None:
        return f"{kind} below {high}" if open_high else f"{kind}, {high} or less"
    return f"{kind} in {'(' if open_low else '['}{low}, {high}{')' if open_high else ']'}"
