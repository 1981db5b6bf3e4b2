"""The numbers of one strategy in a contest, and who is the best on validation rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mediator_cli.compare.paired import is_level

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mediator_cli.compare.contest import Cost
    from mediator_cli.compare.paired import Mean
    from mediator_cli.errors import Problem
    from mediator_cli.evaluate.report import Difference, TaskResult


@dataclass(frozen=True)
class Result:
    """All numbers of one strategy.

    `seen` and `held_out` are of test rows, `valid` of the rows that it was fitted on; None where it cannot answer them.
    `behind` is its difference to the best on the seen tasks, None for the best itself and for what cannot be compared.
    """

    name: str
    strategy: str
    group: str
    reference: str
    parameters: Mapping[str, Any]
    seen: Mean | None
    held_out: Mean | None
    valid: Mean | None
    tasks: tuple[TaskResult, ...]
    cost: Cost
    facts: Mapping[str, Any]
    behind: Difference | None = None

    @property
    def is_level(self) -> bool:
        """Whether the rows do not tell it from the best."""
        return self.behind is not None and is_level(self.behind)

    @property
    def is_reference(self) -> bool:
        """Whether it is there to compare with."""
        return self.group == "reference"


@dataclass(frozen=True)
class Kept:
    """k experts of one selection, used in one way: which they are, and how well they answer test rows."""

    selector: str
    representative: str | None
    kind: str
    k: int
    experts: tuple[str, ...]
    seen: Mean | None
    held_out: Mean | None
    valid_loss: float | None
    n_bytes: int


@dataclass(frozen=True)
class NotKept:
    """A selection that has no result, and why."""

    shown: str
    problems: tuple[Problem, ...]


def winner_of(results: Sequence[Result]) -> str | None:
    """Name the most exact on validation rows, of several the cheapest; references are left out."""
    known = [
        (-each.valid.accuracy, each.cost.passes, each.cost.n_bytes, each.name)
        for each in results
        if each.valid and not each.is_reference
    ]
    return min(known)[3] if known else None
