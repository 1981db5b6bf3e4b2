"""Experts named together: a folder of adapters or models, or a collection on the Hub, in the place of a list."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from mediator_cli.errors import MediatorError, Problem, RecipeError, some_names
from mediator_cli.recipe.layers import Graded
from mediator_cli.recipe.names import LEGAL_NAME, LONGEST, NAME_RULE, RESERVED_NAMES
from mediator_cli.recipe.strict import Strict

if TYPE_CHECKING:
    from pathlib import Path

    from mediator_cli.recipe.text import FieldPath

HUB_PREFIX = "collection:"
"""What stands before the slug of a collection on the Hub."""
OWN_NAME = "{name}"
"""What is replaced by the expert's name in every text of the entry."""
Listing = Callable[[str], Sequence[str]]
"""Gives the models of a collection, org/name, by its slug; raises MediatorError."""
_SLUG = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_MARKS = ("adapter_config.json", "config.json")
_FORM = "write `experts: {from: ./adapters}`, or a list with such an entry"


class ExpertsFrom(Strict):
    """All experts of a folder or of a collection, in natural order of their names."""

    source: Annotated[
        str,
        Field(
            alias="from",
            min_length=1,
            description="A folder, of which every subfolder with an adapter or a model is an expert named like it; or "
            "collection:org/title-0123456789ab of the Hub, of which every model is one.",
        ),
    ]
    match: Annotated[str, Field(min_length=1, description="Glob on the names: which experts are taken.")] = "*"
    weight: Annotated[Graded, Field(description="Merge coefficient of each of them.")] = 1.0
    prompts: Annotated[
        str | None, Field(description="File of each expert's prompts; {name} stands for the expert's name.")
    ] = None
    second_moments: Annotated[
        str | None, Field(description="Second moments of each expert; {name} stands for the expert's name.")
    ] = None


@dataclass(frozen=True)
class Expanded:
    """A list of experts as if each had been written by itself.

    `written` says where their fields stand in the file: `("experts", 3, "model")` at `("experts", 0, "from")`; empty
    where nothing was named together. What has `problems` is left out of `experts`.
    """

    experts: Any
    written: Mapping[FieldPath, FieldPath] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True)
class _Found:
    """One expert with the field of the file that it stands in; `is_listed` where it came of a `from`."""

    raw: Any
    at: FieldPath
    is_listed: bool = False

    @property
    def name(self) -> str:
        return str(self.raw.get("name", "")) if isinstance(self.raw, dict) else ""

    @property
    def name_field(self) -> FieldPath:
        return (*self.at, "from" if self.is_listed else "name")


def expand_experts(
    raw: Any,  # noqa: ANN401 - YAML data
    folder: Path,
    place: Callable[..., str],
    list_collection: Listing | None = None,
    differing: Collection[str] = ("prompts",),
) -> Expanded:
    """Put every expert of a `from` in its place in the list `experts` of a recipe in `folder`.

    Each has `name`, `model`, and all other fields of the entry but `match`, with {name} filled in. Texts of the fields
    `differing` must hold it where there are several experts. `place` says where a field stands, as LoadedRecipe does.
    """
    entries = list(_entries(raw))
    if not any(_is_from(entry) for entry, _ in entries):
        return Expanded(raw)
    found: list[_Found] = []
    problems: list[Problem] = []
    for entry, at in entries:
        if not _is_from(entry):
            found.append(_Found(entry, at))
            continue
        try:
            found += _listed(entry, at, folder, place, list_collection, differing)
        except RecipeError as error:
            problems += error.problems
    kept, faults = _with_own_names(found, place)
    return Expanded([each.raw for each in kept], _written(kept), (*problems, *faults))


def _entries(raw: Any) -> Iterator[tuple[Any, FieldPath]]:  # noqa: ANN401 - YAML data
    if isinstance(raw, list):
        yield from ((entry, ("experts", index)) for index, entry in enumerate(raw))
    else:
        yield raw, ("experts",)


def _is_from(entry: Any) -> bool:  # noqa: ANN401 - YAML data
    return isinstance(entry, dict) and "from" in entry


def _listed(
    entry: Mapping[Any, Any],
    at: FieldPath,
    folder: Path,
    place: Callable[..., str],
    list_collection: Listing | None,
    differing: Collection[str],
) -> list[_Found]:
    """List the experts of one entry; raise RecipeError with what is wrong with it."""
    if faults := list(_entry_faults(entry, at, place)):
        raise RecipeError(faults)
    rest = {key: value for key, value in entry.items() if key not in ("from", "match")}
    chosen = _chosen(entry, at, _models(str(entry["from"]), folder, place(*at, "from"), list_collection), place)
    for key in differing:
        if isinstance(entry.get(key), str) and OWN_NAME not in entry[key] and len(chosen) > 1:
            message = f"all {len(chosen)} experts would have the same {key}"
            hint = f"write {OWN_NAME} where their names differ, such as data/{OWN_NAME}.jsonl"
            raise RecipeError(Problem(place(*at, key), message, hint))
    return [_Found({"name": n, "model": model, **_filled(rest, n)}, at, True) for n, model in chosen]


def _models(source: str, folder: Path, where: str, list_collection: Listing | None) -> list[tuple[str, str]]:
    """List name and model of each expert, in natural order."""
    if source.startswith(HUB_PREFIX):
        return _of_collection(source.removeprefix(HUB_PREFIX), where, list_collection)
    return _of_folder(source, folder, where)


def _chosen(
    entry: Mapping[Any, Any], at: FieldPath, models: Sequence[tuple[str, str]], place: Callable[..., str]
) -> list[tuple[str, str]]:
    """Keep the experts whose names match."""
    pattern = str(entry.get("match", "*"))
    chosen = [(name, model) for name, model in models if fnmatchcase(name, pattern)]
    if not chosen:
        hint = f"they are {some_names([name for name, _ in models])}"
        raise RecipeError(Problem(place(*at, "match"), f"'{pattern}' matches none of {len(models)} experts", hint))
    return chosen


def _entry_faults(entry: Mapping[Any, Any], at: FieldPath, place: Callable[..., str]) -> Iterator[Problem]:
    for key in ("from", "match"):
        if key in entry and not (isinstance(entry[key], str) and entry[key]):
            yield Problem(place(*at, key), "should be a text", _FORM if key == "from" else "a glob, such as `math*`")
    for key in ("name", "model"):
        if key in entry:
            hint = f"leave `{key}` out, or leave `from` out and name one expert"
            yield Problem(place(*at, key), f"`{key}` does not go with `from`, which names many experts", hint)
    for key in entry:
        if not isinstance(key, str):
            hint = "one of them alone is changed by `overrides: [{match: '*', weights: {NAME: 0.5}}]`"
            yield Problem(place(*at, key), "the experts are named by a `from`, and have no numbers", hint)


def _filled(value: Any, name: str) -> Any:  # noqa: ANN401 - YAML data
    """Fill in the name wherever a text has a place for it."""
    if isinstance(value, dict):
        return {key: _filled(each, name) for key, each in value.items()}
    if isinstance(value, list):
        return [_filled(each, name) for each in value]
    return value.replace(OWN_NAME, name) if isinstance(value, str) else value


def _of_folder(source: str, folder: Path, where: str) -> list[tuple[str, str]]:
    """Give the subfolders that are experts by their names, each as a recipe would write it."""
    path = (folder / source).absolute()
    try:
        names = expert_folders(path)
    except OSError as error:
        message = "no such folder" if not path.exists() else f"cannot be read: {(error.strerror or 'error').lower()}"
        hint = f"relative paths start at the recipe's folder; one of the Hub is {HUB_PREFIX}org/title-0123456789ab"
        raise RecipeError(Problem(f"{where}: {path}", message, hint)) from None
    if not names:
        alone = _is_expert(path)
        message = "is one expert by itself" if alone else f"no subfolder holds an {_MARKS[0]} or a {_MARKS[1]}"
        hint = f"write `- {{name: …, model: {source}}}`" if alone else "name the folder that the adapters lie in"
        raise RecipeError(Problem(f"{where}: {path}", message, hint))
    # A relative path without a dot could be read as a name on the Hub.
    front = source.rstrip("/") if source.startswith((".", "/")) else f"./{source.rstrip('/')}"
    return [(name, f"{front}/{name}") for name in names]


def expert_folders(path: Path) -> list[str]:
    """Name the subfolders that hold an adapter or a model, in natural order; none where the folder is one itself.

    Raises OSError where it cannot be read.
    """
    if _is_expert(path):
        return []
    inside = [each.name for each in path.iterdir() if not each.name.startswith(".") and each.is_dir()]
    return sorted((name for name in inside if _is_expert(path / name)), key=_natural)


def _is_expert(path: Path) -> bool:
    return any((path / mark).is_file() for mark in _MARKS)


def _natural(name: str) -> tuple[tuple[bool, int, str], ...]:
    parts = re.split(r"(\d+)", name)
    return tuple((part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts)


def _of_collection(slug: str, where: str, list_collection: Listing | None) -> list[tuple[str, str]]:
    """Give the models of a collection by names that are allowed: `-` stands for every other letter."""
    if not _SLUG.fullmatch(slug):
        hint = f"copy it from the page's address: {HUB_PREFIX}org/title-0123456789ab"
        raise RecipeError(Problem(where, f"'{slug}' is no collection of the Hub", hint))
    if list_collection is None:
        hint = "load_recipe(…, list_collection=collection_lister(access)), of mediator_cli.checkpoint.hub.collections"
        raise RecipeError(Problem(where, "the Hub is not asked where a recipe is read this way", hint))
    try:
        models = dict.fromkeys(list_collection(slug))
    except MediatorError as error:
        raise RecipeError([replace(item, place=f"{where}: {item.place}") for item in error.problems]) from None
    if not models:
        raise RecipeError(Problem(where, "the collection holds no models", "is it one of data sets?"))
    named = [(_legal(model.rpartition("/")[2]), model) for model in models]
    return sorted(named, key=lambda pair: _natural(pair[0]))


def _legal(text: str) -> str:
    return re.sub("[^A-Za-z0-9_]+", "-", text).strip("-_")[:LONGEST].rstrip("-_") or "expert"


def _with_own_names(found: Sequence[_Found], place: Callable[..., str]) -> tuple[list[_Found], list[Problem]]:
    """Set aside listed experts whose names cannot be, and the later of two of one name where one was listed."""
    kept: dict[str, _Found] = {}
    problems: list[Problem] = []
    others: list[_Found] = []
    for each in found:
        first, where = kept.get(each.name.lower()), place(*each.name_field)
        if first is not None and (first.is_listed or each.is_listed):
            hint = "name one of them otherwise, or leave it out by `match`"
            message = f"two experts are called '{each.name}': {first.raw.get('model')} and {each.raw.get('model')}"
            problems.append(Problem(where, message, hint))
        elif each.is_listed and (fault := _name_fault(each.name)):
            hint = "leave it out by `match`, and write it with a `name` of its own"
            problems.append(Problem(where, fault, hint))
        else:
            others.append(each)
            kept.setdefault(each.name.lower(), each)
    return others, problems


def _name_fault(name: str) -> str:
    if name.lower() in RESERVED_NAMES:
        return f"no expert may be called '{name}', which means something else"
    return "" if re.fullmatch(LEGAL_NAME, name) else f"'{name}' is no name of an expert: {NAME_RULE}"


def _written(kept: Sequence[_Found]) -> dict[FieldPath, FieldPath]:
    found: dict[FieldPath, FieldPath] = {}
    for index, each in enumerate(kept):
        found["experts", index] = each.at
        if each.is_listed:
            found |= {("experts", index, key): (*each.at, "from") for key in ("name", "model")}
    return found
