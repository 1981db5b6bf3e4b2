"""What a contest came to: a row for each strategy, the best of them, and conclusions from the numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from mediator_cli.compare.conclusions import best_of, conclude
from mediator_cli.compare.paired import difference_of, mean_of
from mediator_cli.compare.result import Kept, NotKept, Result, winner_of
from mediator_cli.evaluate.report import task_result

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mediator_cli.compare.conclusions import Conclusion
    from mediator_cli.compare.contest import Scores
    from mediator_cli.compare.strategies_run import Outcome
    from mediator_cli.errors import Problem
    from mediator_cli.evaluate.report import Difference
    from mediator_cli.strategies.bench import TaskRows


@dataclass(frozen=True)
class Conditions:
    """What was measured under which conditions."""

    version: str
    base: str
    experts: tuple[str, ...]
    seen: Mapping[str, int]
    held_out: Mapping[str, int]
    threads: int
    timed_rows: int
    base_bytes: int
    seed: int


@dataclass(frozen=True)
class ContestReport:
    """The results in the order of the recipe, who is best on test rows and who on validation rows, and what follows.

    `winner` is chosen on validation rows alone; `best` is what the table's marks are against. `failed` could not be
    fitted or could not answer. `selection` tells how well few experts do.
    """

    results: tuple[Result, ...]
    best: str | None
    winner: str | None
    conclusions: tuple[Conclusion, ...]
    conditions: Conditions
    notes: tuple[str, ...] = ()
    failed: tuple[tuple[str, str], ...] = ()
    selection: tuple[Kept, ...] = ()


def report_of(
    outcomes: Sequence[Outcome],
    tasks: Sequence[TaskRows],
    conditions: Conditions,
    notes: Sequence[str] = (),
    selected: Sequence[Kept | NotKept] = (),
) -> ContestReport:
    """Sum up what strategies did."""
    seen = [task.name for task in tasks if not task.is_held_out]
    held_out = [task.name for task in tasks if task.is_held_out]
    answered = [outcome for outcome in outcomes if outcome.answered is not None]
    scores = {outcome.entry.label: outcome.answered.scores for outcome in answered if outcome.answered is not None}
    results = tuple(_result(outcome, seen, held_out) for outcome in answered)
    best = best_of(results)
    results = tuple(replace(each, behind=_behind(each, best, scores, seen, conditions.seed)) for each in results)
    return ContestReport(
        results=results,
        best=best,
        winner=winner_of(results),
        conclusions=tuple(conclude(results, scores, seen, held_out, conditions.seed)),
        conditions=conditions,
        notes=tuple(notes),
        failed=(
            *((outcome.entry.label, _told(outcome.problems)) for outcome in outcomes if outcome.answered is None),
            *((each.shown, _told(each.problems)) for each in selected if isinstance(each, NotKept)),
        ),
        selection=tuple(each for each in selected if isinstance(each, Kept)),
    )


def _told(problems: Sequence[Problem]) -> str:
    return "; ".join(f"{each.place}: {each.message}" if each.place else each.message for each in problems)


def _result(outcome: Outcome, seen: Sequence[str], held_out: Sequence[str]) -> Result:
    found, entry = outcome.answered, outcome.entry
    if found is None:
        raise TypeError(entry.label)
    return Result(
        name=entry.label,
        strategy=entry.strategy.name,
        group=entry.strategy.group,
        reference=entry.strategy.reference,
        parameters=dict(entry.parameters),
        seen=mean_of(found.scores, seen),
        held_out=mean_of(found.scores, held_out),
        valid=mean_of(found.valid, seen),
        tasks=tuple(task_result(task, rows) for task, rows in found.scores.items()),
        cost=found.cost,
        facts=dict(found.facts),
    )


def _behind(
    result: Result, best: str | None, scores: Mapping[str, Scores], seen: Sequence[str], seed: int
) -> Difference | None:
    if best is None or result.name == best or result.seen is None:
        return None
    return difference_of(scores[result.name], scores[best], seen, seed, result.name)


def as_json(report: ContestReport) -> dict[str, Any]:
    """Give a report as JSON data."""
    data = asdict(report)
    for row, result in zip(data["results"], report.results, strict=True):
        row["is_level_with_best"] = result.is_level
    return data
