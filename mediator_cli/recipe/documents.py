"""Several mergekit configurations in one file: merges with a name, which others use as if it were a model's path."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mediator_cli.errors import Problem, RecipeError
from mediator_cli.recipe.load import parse_document
from mediator_cli.recipe.mergekit.translate import is_mergekit
from mediator_cli.recipe.text import compose_all, read_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from mediator_cli.recipe.load import LoadedRecipe
    from mediator_cli.recipe.text import Document

_NO_MODELS = (
    "merge_method", "dtype", "out_dtype", "chat_template", "name", "parameters", "gate_mode", "architecture",
    "positive_prompts", "negative_prompts",
)  # fmt: skip
"""Fields that name no model."""


@dataclass(frozen=True)
class Step:
    """One merge of a file: its name, None for the last one if it has none, and the names of those that it uses."""

    name: str | None
    document: Document
    uses: tuple[str, ...]

    def load(self, folders: Mapping[str, Path], changes: Sequence[str] = ()) -> LoadedRecipe:
        """Read it as a recipe; `folders` are those of the merges that it uses."""
        data = _with_folders(self.document.data, {name: str(folder) for name, folder in folders.items()})
        return parse_document(self.document, data, changes)


def read_steps(path: Path) -> tuple[Step, ...]:
    """Read all merges of a file in an order in which each finds those that it uses; one alone for a plain recipe.

    Raises RecipeError where names are missing, given twice, or use each other.
    """
    documents = compose_all(path, read_text(path))
    if len(documents) == 1:
        return (Step(None, documents[0], ()),)
    problems = [*_check(documents)]
    if problems:
        raise RecipeError(problems)
    names = [_name(document) for document in documents]
    steps = [
        Step(name, document, tuple(sorted(_used(document.data, {each for each in names if each is not None}))))
        for name, document in zip(names, documents, strict=True)
    ]
    return tuple(_ordered(steps))


def _name(document: Document) -> str | None:
    name = document.data.get("name")
    return None if name is None else str(name)


def _check(documents: Sequence[Document]) -> Iterator[Problem]:
    seen: dict[str | None, int] = {}
    for document in documents:
        name = _name(document)
        if not is_mergekit(document.data):
            message = "several documents in a file are for mergekit configurations, and this is none"
            yield Problem(document.place(), message, "write one recipe a file")
        elif name in seen:
            said = f"the name '{name}' is taken" if name else "there is another merge without a name"
            yield Problem(document.place("name"), f"{said}, in line {seen[name]}", "name each merge, but the last")
        elif name is not None and ("/" in name or name in (".", "..")):
            yield Problem(document.place("name"), f"'{name}' is no name of a folder", "leave slashes out")
        seen.setdefault(name, document.line)


def _ordered(steps: Sequence[Step]) -> list[Step]:
    """Put each merge behind those that it uses, and the one without a name last."""
    done: list[Step] = []
    left = sorted(steps, key=lambda step: step.name is None)
    while left:
        known = {step.name for step in done}
        ready = next((step for step in left if set(step.uses) <= known), None)
        if ready is None:
            names = ", ".join(str(step.name) for step in left)
            raise RecipeError(Problem(left[0].document.place(), f"merges use each other: {names}", "break the circle"))
        done.append(ready)
        left.remove(ready)
    return done


def _used(data: Mapping[str, Any], names: set[str]) -> set[str]:
    found: set[str] = set()

    def note(text: str) -> str:
        if (path := _path_of(text)) in names:
            found.add(path)
        return text

    _mapped(data, note)
    return found


def _with_folders(data: dict[str, Any], folders: Mapping[str, str]) -> dict[str, Any]:
    """Put folders in the place of names, where models are named."""

    def replaced(text: str) -> str:
        path = _path_of(text)
        return folders[path] + text[len(path) :] if path in folders else text

    found: dict[str, Any] = _mapped(data, replaced)
    return found


def _path_of(text: str) -> str:
    return text.split("+")[0].split("@")[0]


def _mapped(value: Any, change: Any) -> Any:  # noqa: ANN401 - YAML data
    if isinstance(value, dict):
        return {key: each if key in _NO_MODELS else _mapped(each, change) for key, each in value.items()}
    if isinstance(value, list):
        return [_mapped(each, change) for each in value]
    return change(value) if isinstance(value, str) else value
