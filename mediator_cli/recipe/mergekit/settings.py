"""Values of parameters with their filters: the first whose filter fits a tensor's name holds, scope by scope."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mediator_cli.recipe.mergekit.source import FieldPath


@dataclass(frozen=True)
class Setting:
    """One value of a parameter, for tensors whose name holds `filter`, None for all; `at` is where it stands."""

    filter: str | None
    value: Any
    at: FieldPath
    value_at: FieldPath


@dataclass(frozen=True)
class Scope:
    """A mapping of parameters, and where it stands."""

    values: Mapping[str, Any]
    at: FieldPath


def chain(scopes: Sequence[Scope], key: str) -> list[Setting]:
    """List the values of a parameter, nearest scope first, up to the first that holds for all names."""
    found: list[Setting] = []
    for scope in scopes:
        found += _settings(scope.values[key], (*scope.at, key)) if key in scope.values else []
    first = next((at for at, setting in enumerate(found) if setting.filter is None), len(found))
    return found[: first + 1]


def _settings(value: Any, at: FieldPath) -> list[Setting]:  # noqa: ANN401 - YAML data
    if isinstance(value, dict):
        return [_condition(value, at)]
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return [_condition(item, (*at, index)) for index, item in enumerate(value)]
    # An empty list, or nothing, is no value.
    return [] if value is None or value == [] else [Setting(None, value, at, at)]


def _condition(item: Any, at: FieldPath) -> Setting:  # noqa: ANN401 - YAML data
    if not isinstance(item, dict):
        return Setting(None, item, at, at)
    wanted = item.get("filter")
    return Setting(None if wanted in (None, "*") else str(wanted), item.get("value"), at, (*at, "value"))


def glob_of(text: str) -> str:
    """Write a glob for names that hold a text.

    >>> glob_of("self_attn"), glob_of("a[0]")
    ('*self_attn*', '*a[[]0]*')
    """
    return "*" + re.sub(r"([\[*?])", r"[\1]", text) + "*"
