"""A configuration with the places of its fields, and the recipe that grows out of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mediator_cli.errors import Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    FieldPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Source:
    """The configuration and where its fields stand."""

    data: Mapping[str, Any]
    lines: Mapping[FieldPath, int]
    place: Callable[..., str]

    @property
    def method(self) -> str:
        """The name of its merge method."""
        return str(self.data["merge_method"])

    def problem(self, at: FieldPath, message: str, hint: str) -> Problem:
        """Say what is wrong with a field."""
        return Problem(self.place(*at), message, hint)


@dataclass
class Draft:
    """The recipe as far as it is translated, the lines of its fields, and what there is to say of it."""

    source: Source
    data: dict[str, Any]
    lines: dict[FieldPath, int] = field(default_factory=dict)
    notices: dict[str, None] = field(default_factory=dict)

    def copy_lines(self, old: FieldPath, new: FieldPath) -> None:
        """Let a field of the recipe, and all in it, stand where a field of the configuration does."""
        found = {new + at[len(old) :]: line for at, line in self.source.lines.items() if at[: len(old)] == old}
        # Fields around it that the configuration lacks stand where this one does.
        line = found.get(new, 1)
        self.lines.update({new[:n]: line for n in range(1, len(new)) if new[:n] not in self.lines})
        self.lines.update(found)

    def notice(self, at: FieldPath, text: str) -> None:
        """Tell of a field that is read otherwise than it stands, once."""
        self.notices[f"{self.source.place(*at)}: {text}"] = None
