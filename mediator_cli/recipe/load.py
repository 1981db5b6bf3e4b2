"""YAML to Recipe: every problem at once, each with file:line and field. Reads no other file; may list a folder."""

from __future__ import annotations

import re
import typing
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel, ValidationError

from mediator_cli.errors import Problem, RecipeError, did_you_mean
from mediator_cli.recipe.collections import Expanded, expand_experts
from mediator_cli.recipe.mergekit.translate import from_mergekit, is_mergekit
from mediator_cli.recipe.prune import prune
from mediator_cli.recipe.router import POLICY_FIELDS
from mediator_cli.recipe.schema import RULE_FIELDS, Recipe
from mediator_cli.recipe.text import Document, FieldPath, Loader, compose_all, line_of, place_of, read_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from pydantic.fields import FieldInfo

    from mediator_cli.recipe.collections import Listing

HETEROGENEOUS = "heterogeneous_moe"
"""The kind of recipe with a schema of its own: experts of different architectures, and no base."""
COMPARE = "compare"
"""The kind of recipe that compares ways to use a library of experts; its schema is in `compare.py`."""
_SHARED_FIELDS: Mapping[FieldPath, Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {("assign",): RULE_FIELDS, ("router", "policy"): POLICY_FIELDS}
)


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe, the text that it came from, and the line of every field in it; 0 for what the command line set.

    With `problems` of form, `recipe` is what is left without the faulty fields: fit to be checked, not to be merged.
    `notices` tell what was read otherwise than written. `written` says where fields stand that were made of others.
    """

    recipe: Recipe
    path: Path
    text: str
    lines: Mapping[FieldPath, int]
    changes: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()
    notices: tuple[str, ...] = ()
    written: Mapping[FieldPath, FieldPath] = field(default_factory=dict)

    def place(self, *field: str | int) -> str:
        """Say where a field stands: `recipe.yaml:12 assign.rule`."""
        return place_of(self.path, self.lines, as_written(field, self.written))

    def resolve(self, source: str) -> Path:
        """Return the path that the recipe means: relative ones start at the recipe's folder."""
        return (self.path.parent / source).absolute()

    def ordered(self, problems: Sequence[Problem]) -> list[Problem]:
        """Sort problems by their line in the recipe; those of the command line and of no line come first."""
        return sorted_by_line(self.path, problems)


def sorted_by_line(path: Path, problems: Sequence[Problem]) -> list[Problem]:
    """Sort problems by their line in a recipe; those of the command line and of no line come first."""

    def line(problem: Problem) -> int:
        found = re.match(r":(\d+)", problem.place.removeprefix(str(path)))
        return int(found[1]) if found else 0

    return sorted(problems, key=line)


def as_written(field: FieldPath, written: Mapping[FieldPath, FieldPath]) -> FieldPath:
    """Say which field of the file a field was made of."""
    known = next((field[:n] for n in range(len(field), 0, -1) if field[:n] in written), ())
    return (*written.get(known, ()), *field[len(known) :])


def load_recipe(path: Path, changes: Sequence[str] = (), list_collection: Listing | None = None) -> LoadedRecipe:
    """Read and check a recipe; `changes` are `field.path=value` texts that win over the file.

    A change of a `rule` or of a `method` drops the fields in the file that the new one does not share.
    `list_collection` is asked for the models of collections on the Hub; without it, a recipe can name none.

    Raises RecipeError with all problems of form, ordered by line.
    """
    loaded = load_partly(path, changes, list_collection)
    if loaded.problems:
        raise RecipeError(loaded.problems)
    return loaded


def load_partly(path: Path, changes: Sequence[str] = (), list_collection: Listing | None = None) -> LoadedRecipe:
    """Read a recipe and keep its problems of form where enough is left to check what it means.

    `make_plan` then reports form, meaning and headers together. Raises RecipeError where nothing else can be checked.
    """
    return parse_partly(path, read_text(path), changes, list_collection)


def parse_partly(
    path: Path, text: str, changes: Sequence[str] = (), list_collection: Listing | None = None
) -> LoadedRecipe:
    """Read a recipe's text as if it stood in the file `path`; like `load_partly`, but nothing needs to be on disk."""
    documents = compose_all(path, text)
    if len(documents) > 1:
        message = f"the file holds {len(documents)} merges"
        hint = "`mediator merge` carries them out one after the other; all else takes a file with one"
        raise RecipeError(Problem(documents[1].place(), message, hint))
    return parse_document(documents[0], documents[0].data, changes, list_collection)


def parse_document(
    document: Document, data: dict[str, Any], changes: Sequence[str] = (), list_collection: Listing | None = None
) -> LoadedRecipe:
    """Check a document's data, which may have been changed since it was read."""
    path, text, lines = document.path, document.text, dict(document.lines)
    notices: tuple[str, ...] = ()
    if data.get("kind") == HETEROGENEOUS:
        message = "is a recipe that only `mediator validate`, `plan` and `merge` take"
        raise RecipeError(Problem(document.place("kind"), message, "for a bundle write `kind: mediator`, and a base"))
    if data.get("kind") == COMPARE:
        message = "is a recipe that only `mediator compare` takes"
        raise RecipeError(Problem(document.place("kind"), message, f"mediator compare {path}"))
    if is_mergekit(data):
        written = lines
        data, lines, notices = from_mergekit(data, written, lambda *field: place_of(path, written, field))
    lines = apply_changes(data, lines, changes)
    given = expand_experts(data.get("experts"), path.parent, lambda *at: place_of(path, lines, at), list_collection)
    if given.written or given.problems:
        data = {**data, "experts": given.experts}
    return replace(_validate(path, text, data, lines, tuple(changes), given), notices=notices)


def apply_changes(data: dict[str, Any], lines: dict[FieldPath, int], changes: Sequence[str]) -> dict[FieldPath, int]:
    """Set fields of a recipe's data as `field.path=value` texts say; give the lines of all fields after that.

    Raises RecipeError for a change that names no place.
    """
    # A new rule or method drops what belonged to the old one, so it goes before changes of its own fields.
    for change in sorted(changes, key=lambda text: not _chooses(text)):
        lines = _lines_after(lines, _apply_change(data, change))
    return lines


def _apply_change(data: dict[str, Any], change: str) -> FieldPath:
    name, separator, raw = change.partition("=")
    place = f"--set {change}"
    parts = [part for part in re.split(r"[.\[\]]+", name) if part]
    if not separator or not parts:
        raise RecipeError(Problem(place, "is not field=value", "write for example --set assign.rule=all"))
    field: FieldPath = tuple(int(part) if re.fullmatch("[0-9]+", part) else part for part in parts)
    try:
        value = yaml.load(raw, Loader=Loader)
    except yaml.YAMLError:
        raise RecipeError(Problem(place, "the value is not YAML", "quote it")) from None
    target: Any = data
    for part in field[:-1]:
        target = _step_into(target, part, place)
    _step_check(target, field[-1], place)
    if _chooses(change):
        kept = _SHARED_FIELDS.get(field[:-1], {}).get(str(value), ())
        for name in [name for name in target if name not in kept]:
            del target[name]
    target[field[-1]] = value
    return field


def _chooses(change: str) -> bool:
    """Whether a change chooses a rule or a method, which have fields of their own."""
    return change.partition("=")[0].endswith((".rule", ".method"))


def _lines_after(lines: Mapping[FieldPath, int], changed: FieldPath) -> dict[FieldPath, int]:
    """Note that a field, all in it, and those around it that the file lacks come from the command line."""
    kept = {field: line for field, line in lines.items() if field[: len(changed)] != changed}
    return {**{changed[:n]: 0 for n in range(1, len(changed) + 1)}, **kept}


def _step_into(target: Any, part: str | int, place: str) -> Any:  # noqa: ANN401 - YAML data
    _step_check(target, part, place)
    if isinstance(target, dict):
        return target.setdefault(part, {})
    return target[part]


def _step_check(target: Any, part: str | int, place: str) -> None:  # noqa: ANN401 - YAML data
    fits = isinstance(target, dict) or (isinstance(target, list) and isinstance(part, int) and part < len(target))
    if not fits:
        raise RecipeError(Problem(place, f"the recipe has no field '{part}' there", "see `mediator schema`"))


def _validate(
    path: Path,
    text: str,
    data: dict[str, Any],
    lines: dict[FieldPath, int],
    changes: tuple[str, ...],
    given: Expanded,
) -> LoadedRecipe:
    """Check the form; with faults, go on with what is left of the recipe, so that its meaning can be checked too."""
    made, faults = _made(data)
    # An item that does not validate is left out, and then its list seems too short: say only what is wrong inside.
    told = [item for item in faults if item["type"] != "too_short" or not (item["input"] or given.problems)]
    problems = [*given.problems, *form_problems(path, lines, told, Recipe, written=given.written)]
    made = made or _made(prune(data, [tuple(item["loc"]) for item in told]))[0]
    # Without the experts that a folder should have given, what the rest means is anyone's guess.
    if made is None or given.problems:
        raise RecipeError(sorted_by_line(path, problems))
    return LoadedRecipe(made, path, text, MappingProxyType(lines), changes, tuple(problems), written=given.written)


def _made(data: dict[str, Any] | None) -> tuple[Recipe | None, Sequence[Any]]:
    """Make a recipe of its data, or give the faults."""
    try:
        return Recipe.model_validate(data), ()
    except ValidationError as error:
        return None, error.errors(include_url=False)


def form_problems(
    path: Path,
    lines: dict[FieldPath, int],
    faults: Sequence[Any],
    schema: type[BaseModel],
    name: str = "recipe",
    written: Mapping[FieldPath, FieldPath] = MappingProxyType({}),
) -> tuple[Problem, ...]:
    """Tell faults, as pydantic gives them for a schema, each with its place, ordered by line.

    `name` is what `mediator schema` calls the schema; `written` are fields that were made of others in the file. What
    is wrong with several experts that one field names is told once.
    """
    found = [_problem(path, lines, item, schema, name, written) for item in faults]
    return tuple(dict.fromkeys(problem for _, problem in sorted(found, key=lambda pair: pair[0])))


def _problem(
    path: Path,
    lines: dict[FieldPath, int],
    item: Any,  # noqa: ANN401 - pydantic's dict
    schema: type[BaseModel],
    name: str,
    written: Mapping[FieldPath, FieldPath],
) -> tuple[int, Problem]:
    field: FieldPath = tuple(item["loc"])
    shown = as_written(field, written)
    line, place = line_of(lines, shown), place_of(path, lines, shown)
    if item["type"] == "extra_forbidden":
        hint = did_you_mean(str(field[-1]), _fields_of(field[:-1], schema))
        return line, Problem(place, f"unknown key '{field[-1]}'", hint)
    if item["type"] == "missing":
        return line, Problem(place, "is required", f"add `{field[-1]}`")
    if item["type"] == "string_pattern_mismatch":
        return line, Problem(place, f"{item['input']!r} is not allowed", _description_at(field, schema))
    message = item["msg"].removeprefix("Value error, ")
    given = item["input"]
    got = f" (got {given!r})" if isinstance(given, str | int | float) else ""
    return line, Problem(place, message[0].lower() + message[1:] + got, f"see `mediator schema {name}`")


def _description_at(field: FieldPath, schema: type[BaseModel]) -> str:
    fields = _fields_of(field[:-1], schema)
    return (fields[str(field[-1])].description or "") if str(field[-1]) in fields else ""


def _fields_of(field: FieldPath, schema: type[BaseModel]) -> dict[str, FieldInfo]:
    model: Any = schema
    for part in field:
        if isinstance(part, str) and model is not None:
            model = _model_in(model.model_fields[part].annotation) if part in model.model_fields else None
    return dict(model.model_fields) if model is not None else {}


def _model_in(annotation: Any) -> type[BaseModel] | None:  # noqa: ANN401 - any annotation
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in typing.get_args(annotation) if (found := _model_in(arg))), None)
