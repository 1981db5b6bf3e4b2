"""Evaluate models on tasks, one model in memory at a time."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from mediator_cli.errors import CheckpointError, MediatorError, Problem
from mediator_cli.evaluate import memory
from mediator_cli.evaluate.models import load_candidate
from mediator_cli.evaluate.report import ModelResult, Report, compare, mean_over_tasks, task_result
from mediator_cli.evaluate.score import ScoreSettings, score_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mediator_cli.evaluate.models import Candidate
    from mediator_cli.evaluate.score import RowScore
    from mediator_cli.evaluate.tasks import Task

    Scores = dict[str, list[RowScore]]


@dataclass(frozen=True)
class EvaluateSettings:
    """How to evaluate: `limit` takes the first rows of each task; `progress` hears of stage, rows done and total."""

    limit: int | None = None
    score: ScoreSettings = field(default_factory=ScoreSettings)
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None
    seed: int = 0


def evaluate(
    candidates: Sequence[Candidate], tasks: Sequence[Task], settings: EvaluateSettings | None = None
) -> Report:
    """Score every model on every task and compare all with the first.

    Raises CheckpointError or BundleError when a model is damaged or a prompt too long for it.
    """
    settings = settings or EvaluateSettings()
    tasks = [replace(task, rows=task.rows[: settings.limit]) for task in tasks]
    results: list[ModelResult] = []
    exact: dict[str, dict[str, list[bool]]] = {}
    for candidate in candidates:
        held = memory.resident_bytes()
        memory.start_peak()
        scores, seconds = _score(candidate, tasks, settings)
        peak = memory.peak_bytes()
        found = tuple(task_result(task, rows) for task, rows in scores.items())
        grown = None if peak is None or held is None else max(0, peak - held)
        n_rows = sum(len(task.rows) for task in tasks)
        results.append(
            ModelResult(candidate.name, found, *mean_over_tasks(found), candidate.n_bytes, grown, seconds / n_rows)
        )
        exact[candidate.name] = {task: [score.exact for score in rows] for task, rows in scores.items()}
    return Report(tuple(results), compare(exact, settings.seed))


def _score(candidate: Candidate, tasks: Sequence[Task], settings: EvaluateSettings) -> tuple[Scores, float]:
    """Load one model and score all tasks; returns the seconds that the answers took, loading not counted."""
    model, tokenizer = load_candidate(candidate)
    total, done = sum(len(task.rows) for task in tasks), 0
    settings.progress(candidate.name, 0, total)

    def advance(n: int) -> None:
        nonlocal done
        done += n
        settings.progress(candidate.name, done, total)

    scores: Scores = {}
    started = time.perf_counter()
    for task in tasks:
        own = replace(settings.score, mixture=candidate.mixture(task.name))
        try:
            scores[task.name] = score_rows(model, tokenizer, task.rows, own, advance)
        except MediatorError as error:
            raise CheckpointError([_within(candidate, task, problem) for problem in error.problems]) from None
    return scores, time.perf_counter() - started


def _within(candidate: Candidate, task: Task, problem: Problem) -> Problem:
    place = f"{candidate.name} on {task.name}"
    return Problem(f"{place}, {problem.place}" if problem.place else place, problem.message, problem.hint)
