"""The models of a configuration: which are experts, under which names, and which is the base."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mediator_cli.recipe.mergekit.forms import Input, reference_of
from mediator_cli.recipe.mergekit.methods import COUNTERPARTS
from mediator_cli.recipe.mergekit.settings import Scope
from mediator_cli.recipe.names import unique_names

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mediator_cli.errors import Problem
    from mediator_cli.recipe.mergekit.forms import Part
    from mediator_cli.recipe.mergekit.source import FieldPath, Source


@dataclass(frozen=True)
class Names:
    """The base, the experts as the recipe lists them, where they stand, and the name of each model."""

    base: str
    experts: list[dict[str, Any]]
    places: tuple[FieldPath, ...]
    known: dict[str, str]


def base_of(source: Source, parts: Sequence[Part]) -> str:
    """Give the model that the others are read against, and whose config and tokenizer are written."""
    return reference_of(source.data.get("base_model")) or parts[0].base or parts[0].inputs[0].model


def with_base(source: Source, part: Part) -> Part:
    """Add the base to the models where it is merged like them, as mergekit does though it is not listed."""
    role, named = COUNTERPARTS[source.method].base, [each.model for each in part.inputs]
    is_merged = role in ("first", "input") and source.method != "passthrough"
    if not is_merged or part.base is None or part.base in named or part.inputs[0].layers:
        return part
    base = Input(part.base, None, Scope({}, ("base_model",)), ("base_model",))
    return replace(part, inputs=(*part.inputs, base))


def check_roles(source: Source, parts: Sequence[Part]) -> Iterator[Problem]:
    """Check that the base has the place that the method needs, and that adapters lie on it."""
    base, role = base_of(source, parts), COUNTERPARTS[source.method].base
    if "+" in base:
        place = ("base_model",) if source.data.get("base_model") else (*parts[0].inputs[0].at, "model")
        yield source.problem(place, f"the base is a model with an adapter: '{base}'", "merge the adapter before")
        return
    for part in parts:
        if part.base is None and role in ("origin", "first"):
            yield source.problem(("merge_method",), f"{source.method} needs base_model", "name the common base")
            return
        yield from _check_base(source, part, base)
        for each in part.inputs:
            if "+" in each.model and each.model.split("+")[0] != base:
                message = f"an adapter on another model than base_model: '{each.model}'"
                yield source.problem((*each.at, "model"), message, "merge the adapter into its model first")


def _check_base(source: Source, part: Part, base: str) -> Iterator[Problem]:
    role, named = COUNTERPARTS[source.method].base, [each.model for each in part.inputs]
    is_sliced = part.inputs[0].layers is not None
    place = (*part.at, "sources" if is_sliced else "models")
    if role == "first" and (len(named) != 2 or part.base not in named):
        message = f"{source.method} is between two models, one of them base_model"
        yield source.problem(place, message, "t = 0 gives base_model, t = 1 the other")
    if role not in ("origin", "origin_if_any") or part.base is None:
        return
    if is_sliced and part.base not in named:
        message = f"{source.method} takes deltas from base_model, and the slice has no layers of it"
        yield source.problem(place, message, "add it to the sources")
    elif part.base != base:
        message = f"{source.method} takes deltas from the layers of {base}, here from another base_model"
        yield source.problem((*part.at, "base_model"), message, "merge this slice before, in a document of its own")
    elif not is_sliced and all(name == part.base for name in named):
        yield source.problem(place, "there is no model beside the base", "add a fine-tune")


def merged_inputs(source: Source, part: Part) -> list[Input]:
    """List what is merged, in the order in which the method here takes it."""
    role = COUNTERPARTS[source.method].base
    if role == "first":
        return sorted(part.inputs, key=lambda each: each.model != part.base)
    if role == "input" or part.base is None:
        return list(part.inputs)
    beside = [each for each in part.inputs if each.model != part.base]
    return beside or list(part.inputs)


def name_experts(source: Source, parts: Sequence[Part]) -> Names:
    """Make the experts. In slices the base has its own name; else it is an expert too where it is merged as one."""
    base = base_of(source, parts)
    is_sliced = parts[0].inputs[0].layers is not None
    found: dict[str, FieldPath] = {}
    for part in parts:
        for each in part.inputs if is_sliced else merged_inputs(source, part):
            if not (is_sliced and each.model == base):
                found.setdefault(each.model, each.at)
    # `base+adapter` is the adapter: here its base is that of the recipe.
    paths = [model.split("+", 1)[-1] for model in found]
    names = names_of(paths)
    experts = [{"name": name, "model": path} for name, path in zip(names, paths, strict=True)]
    known = dict(zip(found, names, strict=True))
    return Names(base, experts, tuple(found.values()), {base: "base", **known} if is_sliced else known)


def names_of(paths: Sequence[str]) -> list[str]:
    """Name experts after the last part of their paths.

    >>> names_of(["org/My.Model@v1", "./a", "b/a"])
    ['My-Model', 'a', 'a-2']
    """
    last = (path.rstrip("/").rsplit("/", 1)[-1].split("@")[0] for path in paths)
    return unique_names([re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-_")[:56] or "expert" for name in last])
