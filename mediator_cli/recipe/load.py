"""YAML to Recipe: every problem at once, each with file:line and field. Reads no other file."""

from __future__ import annotations

import re
import typing
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel, ValidationError

from mediator_cli.errors import Problem, RecipeError, did_you_mean
from mediator_cli.recipe.mergekit import from_mergekit, is_mergekit
from mediator_cli.recipe.prune import prune
from mediator_cli.recipe.router import POLICY_FIELDS
from mediator_cli.recipe.schema import RULE_FIELDS, Recipe

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from pydantic.fields import FieldInfo

FieldPath = tuple[str | int, ...]
_MAX_BYTES = 1_000_000
_MAX_FIELDS = 100_000
_MAX_DEPTH = 20
_SHARED_FIELDS: Mapping[FieldPath, Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {("assign",): RULE_FIELDS, ("router", "policy"): POLICY_FIELDS}
)
_KEY_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe, the text that it came from, and the line of every field in it; 0 for what the command line set.

    With `problems` of form, `recipe` is what is left without the faulty fields: fit to be checked, not to be merged.
    """

    recipe: Recipe
    path: Path
    text: str
    lines: Mapping[FieldPath, int]
    changes: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()

    def place(self, *field: str | int) -> str:
        """Say where a field stands: `recipe.yaml:12 assign.rule`."""
        return place_of(self.path, self.lines, field)

    def resolve(self, source: str) -> Path:
        """Return the path that the recipe means: relative ones start at the recipe's folder."""
        return (self.path.parent / source).absolute()

    def ordered(self, problems: Sequence[Problem]) -> list[Problem]:
        """Sort problems by their line in the recipe; those of the command line and of no line come first."""

        def line(problem: Problem) -> int:
            found = re.match(r":(\d+)", problem.place.removeprefix(str(self.path)))
            return int(found[1]) if found else 0

        return sorted(problems, key=line)


def place_of(path: Path, lines: Mapping[FieldPath, int], field: FieldPath) -> str:
    """Name file, line and field; a field that is not in the file gets the line of its nearest parent."""
    line = _line_of(lines, field)
    return f"{path}:{line} {dotted(field)}".rstrip() if line else f"--set {dotted(field)}"


def _line_of(lines: Mapping[FieldPath, int], field: FieldPath) -> int:
    return next((lines[field[:n]] for n in range(len(field), -1, -1) if field[:n] in lines), 1)


def dotted(field: Sequence[str | int]) -> str:
    """Write a field path as a reader would.

    >>> dotted(("experts", 1, "name"))
    'experts[1].name'
    """
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in field).lstrip(".")


def load_recipe(path: Path, changes: Sequence[str] = ()) -> LoadedRecipe:
    """Read and check a recipe; `changes` are `field.path=value` texts that win over the file.

    A change of a `rule` or of a `method` drops the fields in the file that the new one does not share.

    Raises RecipeError with all problems of form, ordered by line.
    """
    loaded = load_partly(path, changes)
    if loaded.problems:
        raise RecipeError(loaded.problems)
    return loaded


def load_partly(path: Path, changes: Sequence[str] = ()) -> LoadedRecipe:
    """Read a recipe and keep its problems of form where enough is left to check what it means.

    `make_plan` then reports form, meaning and headers together. Raises RecipeError where nothing else can be checked.
    """
    return parse_partly(path, _read_text(path), changes)


def parse_partly(path: Path, text: str, changes: Sequence[str] = ()) -> LoadedRecipe:
    """Read a recipe's text as if it stood in the file `path`; like `load_partly`, but nothing needs to be on disk."""
    node = _compose(path, text)
    lines: dict[FieldPath, int] = {(): 1}
    problems = list(_walk(path, node, (), lines))
    if problems:
        raise RecipeError(problems)
    data = _construct(path, node)
    if is_mergekit(data):
        written = lines
        data, lines = from_mergekit(data, written, lambda *field: place_of(path, written, field))
    # A new rule or method drops what belonged to the old one, so it goes before changes of its own fields.
    for change in sorted(changes, key=lambda text: not _chooses(text)):
        lines = _lines_after(lines, _apply_change(data, change))
    return _validate(path, text, data, lines, tuple(changes))


class _Loader(yaml.SafeLoader):
    """SafeLoader whose floats follow YAML 1.2, so that `1e-3` is a number, and whose errors all have a line."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:  # noqa: ANN401 - YAML data
        try:
            return super().construct_object(node, deep)
        except ValueError as error:
            raise yaml.MarkedYAMLError(problem=str(error), problem_mark=node.start_mark) from None


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _read_text(path: Path) -> str:
    try:
        if path.is_file() and path.stat().st_size > _MAX_BYTES:
            raise RecipeError(Problem(str(path), "is larger than 1 MB", "is this a recipe?"))
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise RecipeError(Problem(str(path), "is not UTF-8 text", "save it as UTF-8")) from None
    except OSError as error:
        reason = (error.strerror or "unreadable").lower()
        raise RecipeError(Problem(str(path), f"cannot read the recipe: {reason}", "check the path")) from None


def _compose(path: Path, text: str) -> yaml.Node:
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        raise _broken(path, error) from None
    except yaml.reader.ReaderError as error:
        place = f"{path}:{text.count(chr(10), 0, error.position) + 1}"
        raise RecipeError(Problem(place, f"broken YAML: {error.reason}", "check for control characters")) from None
    except RecursionError:
        raise RecipeError(Problem(str(path), "is nested too deeply", "is this a recipe?")) from None
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(Problem(f"{path}:1", "a recipe is a mapping of fields", "start with `version: 1`"))
    return node


def _broken(path: Path, error: yaml.MarkedYAMLError) -> RecipeError:
    line = error.problem_mark.line + 1 if error.problem_mark else 1
    message = f"broken YAML: {error.problem or error.context}"
    return RecipeError(Problem(f"{path}:{line}", message, "check indentation, quotes and colons"))


def _construct(path: Path, node: yaml.Node) -> dict[str, Any]:
    try:
        data: dict[str, Any] = _Loader("").construct_document(node)
    except yaml.MarkedYAMLError as error:
        raise _broken(path, error) from None
    return data


def _walk(path: Path, node: yaml.Node, field: FieldPath, lines: dict[FieldPath, int]) -> Iterator[Problem]:
    line = node.start_mark.line + 1
    if len(field) > _MAX_DEPTH or len(lines) > _MAX_FIELDS:
        raise RecipeError(Problem(f"{path}:{line}", "is nested too deeply", "does an alias refer to itself?"))
    if not node.tag.startswith("tag:yaml.org,2002:") or "python" in node.tag:
        yield Problem(f"{path}:{line}", f"YAML tag {node.tag} is not allowed", "write plain values")
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[(*field, index)] = item.start_mark.line + 1
            yield from _walk(path, item, (*field, index), lines)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from _check_key(path, key, field, lines)
            inner = (*field, str(key.value))
            lines[inner] = key.start_mark.line + 1
            yield from _walk(path, value, inner, lines)


def _check_key(path: Path, key: yaml.Node, field: FieldPath, lines: Mapping[FieldPath, int]) -> Iterator[Problem]:
    line, inner = key.start_mark.line + 1, (*field, str(key.value))
    if key.tag not in _KEY_TAGS:
        yield Problem(f"{path}:{line} {dotted(field)}".rstrip(), "a key is not a text", "quote it, or mend its name")
    elif inner in lines:
        yield Problem(
            f"{path}:{line} {dotted(inner)}", f"given twice, first in line {lines[inner]}", "keep one of them"
        )


def _apply_change(data: dict[str, Any], change: str) -> FieldPath:
    name, separator, raw = change.partition("=")
    place = f"--set {change}"
    parts = [part for part in re.split(r"[.\[\]]+", name) if part]
    if not separator or not parts:
        raise RecipeError(Problem(place, "is not field=value", "write for example --set assign.rule=all"))
    field: FieldPath = tuple(int(part) if re.fullmatch("[0-9]+", part) else part for part in parts)
    try:
        value = yaml.load(raw, Loader=_Loader)
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
    path: Path, text: str, data: dict[str, Any], lines: dict[FieldPath, int], changes: tuple[str, ...]
) -> LoadedRecipe:
    """Check the form; with faults, go on with what is left of the recipe, so that its meaning can be checked too."""
    try:
        return LoadedRecipe(Recipe.model_validate(data), path, text, MappingProxyType(lines), changes)
    except ValidationError as error:
        faults = error.errors(include_url=False)
    # An item that does not validate is left out, and then its list seems too short: say only what is wrong inside.
    told = [item for item in faults if item["type"] != "too_short" or not item["input"]]
    found = [_problem(path, lines, item) for item in told]
    problems = tuple(problem for _, problem in sorted(found, key=lambda pair: pair[0]))
    try:
        rest = Recipe.model_validate(prune(data, [tuple(item["loc"]) for item in told]))
    except ValidationError:
        raise RecipeError(problems) from None
    return LoadedRecipe(rest, path, text, MappingProxyType(lines), changes, problems)


def _problem(path: Path, lines: dict[FieldPath, int], item: Any) -> tuple[int, Problem]:  # noqa: ANN401 - pydantic's dict
    field: FieldPath = tuple(item["loc"])
    line, place = _line_of(lines, field), place_of(path, lines, field)
    if item["type"] == "extra_forbidden":
        hint = did_you_mean(str(field[-1]), _fields_at(field[:-1]))
        return line, Problem(place, f"unknown key '{field[-1]}'", hint)
    if item["type"] == "missing":
        return line, Problem(place, "is required", f"add `{field[-1]}`")
    if item["type"] == "string_pattern_mismatch":
        return line, Problem(place, f"{item['input']!r} is not allowed", _description_at(field))
    message = item["msg"].removeprefix("Value error, ")
    given = item["input"]
    shown = f" (got {given!r})" if isinstance(given, str | int | float) else ""
    return line, Problem(place, message[0].lower() + message[1:] + shown, "see `mediator schema recipe`")


def _description_at(field: FieldPath) -> str:
    fields = _fields_of(field[:-1])
    return (fields[str(field[-1])].description or "") if str(field[-1]) in fields else ""


def _fields_at(field: FieldPath) -> list[str]:
    return list(_fields_of(field))


def _fields_of(field: FieldPath) -> dict[str, FieldInfo]:
    model: Any = Recipe
    for part in field:
        if isinstance(part, str) and model is not None:
            model = _model_in(model.model_fields[part].annotation) if part in model.model_fields else None
    return dict(model.model_fields) if model is not None else {}


def _model_in(annotation: Any) -> type[BaseModel] | None:  # noqa: ANN401 - any annotation
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in typing.get_args(annotation) if (found := _model_in(arg))), None)
