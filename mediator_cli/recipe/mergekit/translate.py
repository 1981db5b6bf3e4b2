"""A mergekit configuration as a recipe: the same merge, or a refusal that names what has no counterpart here.

What differs in spite of the same recipe: random draws, and which of equally large entries are kept. A relative path
starts at the file's folder, as in every recipe.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mediator_cli.errors import RecipeError, did_you_mean
from mediator_cli.recipe.mergekit.dtypes import write_dtype
from mediator_cli.recipe.mergekit.forms import read_parts, reference_of
from mediator_cli.recipe.mergekit.methods import COUNTERPARTS, IGNORED, KNOWN
from mediator_cli.recipe.mergekit.models import check_roles, name_experts, with_base
from mediator_cli.recipe.mergekit.moe import from_moe, is_moe
from mediator_cli.recipe.mergekit.parameters import check_parameters, tell_misplaced, write_part
from mediator_cli.recipe.mergekit.source import Draft, Source
from mediator_cli.recipe.mergekit.tokens import write_tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from mediator_cli.errors import Problem
    from mediator_cli.recipe.mergekit.forms import Part
    from mediator_cli.recipe.mergekit.models import Names
    from mediator_cli.recipe.mergekit.source import FieldPath

_KEYS = (
    "merge_method", "base_model", "models", "slices", "modules", "parameters", "dtype", "out_dtype",
    "tokenizer_source", "tokenizer", "chat_template", "name", "random_seed",
)  # fmt: skip


def is_mergekit(data: Mapping[str, Any]) -> bool:
    """Whether a YAML file is a configuration of mergekit, or of mergekit-moe."""
    return "version" not in data and ("merge_method" in data or is_moe(data))


def from_mergekit(
    data: Mapping[str, Any], lines: Mapping[FieldPath, int], place: Callable[..., str]
) -> tuple[dict[str, Any], dict[FieldPath, int], tuple[str, ...]]:
    """Translate a configuration; the lines of the recipe's fields are those of the fields that they came from.

    `place` says where a field of the configuration stands. Gives also what is read otherwise than it stands. Raises
    RecipeError with all that has no counterpart.
    """
    source = Source(data, lines, place)
    if is_moe(data):
        return from_moe(source)
    problems = list(_check_keys(source))
    parts, faults = read_parts(source)
    problems += faults
    if not problems:
        parts = [with_base(source, part) for part in parts]
        problems += check_roles(source, parts)
    if problems:
        raise RecipeError(problems)
    draft = Draft(source, {"version": 1}, {(): 1, ("version",): 1})
    tell_misplaced(draft, data, ())
    problems = [*check_parameters(draft, parts), *_write(draft, parts)]
    if problems:
        raise RecipeError(problems)
    return draft.data, draft.lines, tuple(draft.notices)


def _check_keys(source: Source) -> Iterator[Problem]:
    if source.method not in COUNTERPARTS:
        message = f"mergekit's method '{source.method}' has no counterpart here"
        yield source.problem(("merge_method",), message, did_you_mean(source.method, COUNTERPARTS))
    for key in source.data:
        if key not in (*_KEYS, *KNOWN, *IGNORED):
            yield source.problem((key,), f"unknown key '{key}'", did_you_mean(str(key), _KEYS))


def _write(draft: Draft, parts: list[Part]) -> Iterator[Problem]:
    """Write the recipe's fields in the order in which a person would."""
    names = name_experts(draft.source, parts)
    draft.data |= {"base": names.base, "experts": names.experts, "assign": {"rule": "none"}, "anchors": "first"}
    _copy_places(draft, parts, names)
    for index, part in enumerate(parts):
        yield from write_part(draft, names, part, index if part.inputs[0].layers else None)
    if draft.source.data.get("random_seed") is not None:
        draft.data["seed"] = draft.source.data["random_seed"]
        draft.copy_lines(("random_seed",), ("seed",))
    yield from write_dtype(draft, "out_dtype", "dtype")
    yield from write_tokens(draft, names)


def _copy_places(draft: Draft, parts: list[Part], names: Names) -> None:
    first = parts[0].inputs[0].at
    draft.copy_lines(("base_model",) if draft.source.data.get("base_model") else (*first, "model"), ("base",))
    for at, place in enumerate(names.places):
        draft.copy_lines(place, ("experts", at))


def name_of(data: Mapping[str, Any]) -> str | None:
    """Give the name of a merge that others may use."""
    name = data.get("name")
    return None if name is None else str(name)


def models_in(data: Mapping[str, Any]) -> set[str]:
    """List all models that a configuration names, without revisions and adapters."""
    found: set[str] = set()
    stack: list[Any] = [data]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            stack += value.values()
            named = [value[key] for key in ("model", "base_model") if key in value]
            found |= {text.split("+")[0].split("@")[0] for each in named if (text := reference_of(each))}
        elif isinstance(value, list):
            stack += value
    return found
