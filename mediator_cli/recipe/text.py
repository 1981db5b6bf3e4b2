"""YAML text as plain data: every document of a file, with the line of every field."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from mediator_cli.errors import Problem, RecipeError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

FieldPath = tuple[str | int, ...]
_MAX_BYTES = 1_000_000
_MAX_FIELDS = 100_000
_MAX_DEPTH = 20
_KEY_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")


def place_of(path: Path, lines: Mapping[FieldPath, int], field: FieldPath) -> str:
    """Name file, line and field; a field that is not in the file gets the line of its nearest parent."""
    line = line_of(lines, field)
    return f"{path}:{line} {dotted(field)}".rstrip() if line else f"--set {dotted(field)}"


def line_of(lines: Mapping[FieldPath, int], field: FieldPath) -> int:
    """Give the line of a field, or of its nearest parent."""
    return next((lines[field[:n]] for n in range(len(field), -1, -1) if field[:n] in lines), 1)


def dotted(field: Sequence[str | int]) -> str:
    """Write a field path as a reader would.

    >>> dotted(("experts", 1, "name"))
    'experts[1].name'
    """
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in field).lstrip(".")


@dataclass(frozen=True)
class Document:
    """One document of a file as data; its text, its first line, and the line of every field."""

    path: Path
    text: str
    line: int
    data: dict[str, Any]
    lines: Mapping[FieldPath, int]

    def place(self, *field: str | int) -> str:
        """Say where a field stands."""
        return place_of(self.path, self.lines, field)


def compose_all(path: Path, text: str) -> list[Document]:
    """Read all documents of a file; raise RecipeError for what is no plain data."""
    nodes = _compose(path, text)
    rows = text.splitlines(keepends=True)
    documents = []
    for node in nodes:
        start = node.start_mark.line
        lines: dict[FieldPath, int] = {(): start + 1 if len(nodes) > 1 else 1}
        if problems := list(_walk(path, node, (), lines)):
            raise RecipeError(problems)
        own = text if len(nodes) == 1 else "".join(rows[start : node.end_mark.line + bool(node.end_mark.column)])
        documents.append(Document(path, own, start + 1, _construct(path, node), lines))
    return documents


class Loader(yaml.SafeLoader):
    """SafeLoader whose floats follow YAML 1.2, so that `1e-3` is a number, and whose errors all have a line."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:  # noqa: ANN401 - YAML data
        """Make data of a node; what is wrong with it is told with its line."""
        try:
            return super().construct_object(node, deep)
        except ValueError as error:
            raise yaml.MarkedYAMLError(problem=str(error), problem_mark=node.start_mark) from None


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_text(path: Path) -> str:
    """Read a recipe's file; raise RecipeError where that is not possible."""
    try:
        if path.is_file() and path.stat().st_size > _MAX_BYTES:
            raise RecipeError(Problem(str(path), "is larger than 1 MB", "is this a recipe?"))
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise RecipeError(Problem(str(path), "is not UTF-8 text", "save it as UTF-8")) from None
    except OSError as error:
        reason = (error.strerror or "unreadable").lower()
        raise RecipeError(Problem(str(path), f"cannot read the recipe: {reason}", "check the path")) from None


def _compose(path: Path, text: str) -> list[yaml.Node]:
    try:
        nodes = list(yaml.compose_all(text, Loader=Loader))
    except yaml.MarkedYAMLError as error:
        raise _broken(path, error) from None
    except yaml.reader.ReaderError as error:
        place = f"{path}:{text.count(chr(10), 0, error.position) + 1}"
        raise RecipeError(Problem(place, f"broken YAML: {error.reason}", "check for control characters")) from None
    except RecursionError:
        raise RecipeError(Problem(str(path), "is nested too deeply", "is this a recipe?")) from None
    strange = [node for node in nodes if not isinstance(node, yaml.MappingNode)]
    if strange or not nodes:
        line = strange[0].start_mark.line + 1 if strange and len(nodes) > 1 else 1
        raise RecipeError(Problem(f"{path}:{line}", "a recipe is a mapping of fields", "start with `version: 1`"))
    return nodes


def _broken(path: Path, error: yaml.MarkedYAMLError) -> RecipeError:
    line = error.problem_mark.line + 1 if error.problem_mark else 1
    message = f"broken YAML: {error.problem or error.context}"
    return RecipeError(Problem(f"{path}:{line}", message, "check indentation, quotes and colons"))


def _construct(path: Path, node: yaml.Node) -> dict[str, Any]:
    try:
        data: dict[str, Any] = Loader("").construct_document(node)
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
