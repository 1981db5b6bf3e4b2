"""A contest of strategies: who takes part, what is kept of each, and what it came to. No torch here."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from mediator_cli.checkpoint.header import read_json
from mediator_cli.compare.store import save
from mediator_cli.errors import CheckpointError, Problem
from mediator_cli.evaluate.score import RowScore

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

Scores = dict[str, tuple[RowScore, ...]]
"""Scores of rows by task."""


@dataclass(frozen=True)
class Cost:
    """What answering costs, in the same terms for all strategies.

    `passes` are products with all of the base's weights that each token needs: one for each member of an ensemble,
    and for low-rank factors that are added to it their own share of the base's size. `n_bytes` are held beside the
    base, in float32. `seconds` for an answer and `memory`, the most bytes that the process grew by while it answered,
    are measured; None where they are not.
    """

    passes: float
    n_bytes: int
    fit_seconds: float
    seconds: float | None = None
    memory: int | None = None


@dataclass(frozen=True)
class Answered:
    """What one strategy did: scores of all test rows, and of the validation rows of tasks that it may see.

    A task that it cannot answer, as references do not know held-out tasks, is in neither. `facts` is what was learned.
    """

    scores: Scores
    valid: Scores
    cost: Cost
    facts: Mapping[str, Any] = field(default_factory=dict)


def save_answered(file: Path, found: Answered) -> None:
    """Keep what a strategy did; the file is whole at any moment."""
    data = {
        "scores": _rows_of(found.scores),
        "valid": _rows_of(found.valid),
        "cost": asdict(found.cost),
        "facts": dict(found.facts),
    }
    save(file, data)


def load_answered(file: Path) -> Answered | None:
    """Read what a strategy did, None where it has not run; raise CheckpointError for a damaged file."""
    if not file.is_file():
        return None
    try:
        data = read_json(file)
        return Answered(_scores_of(data["scores"]), _scores_of(data["valid"]), Cost(**data["cost"]), data["facts"])
    except (CheckpointError, KeyError, TypeError, AttributeError):
        hint = "remove it, its strategy runs again"
        raise CheckpointError(Problem(str(file), "holds no results", hint)) from None


def _rows_of(scores: Scores) -> dict[str, list[list[Any]]]:
    return {task: [list(asdict(score).values()) for score in rows] for task, rows in scores.items()}


def _scores_of(data: Mapping[str, Sequence[Sequence[Any]]]) -> Scores:
    return {task: tuple(RowScore(*values) for values in rows) for task, rows in data.items()}
