"""From scores to numbers: accuracy with its error, means over tasks, paired differences. No torch here."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from mediator_cli.evaluate.score import RowScore

_DRAWS = 10_000


@dataclass(frozen=True)
class TaskResult:
    """How a model did on one task of `n` rows.

    `accuracy` is the share of rows answered exactly, `choice_accuracy` that of rows whose answer was the most probable
    of the choices (None unless all rows have choices); `log_prob` the mean over rows in nats.
    """

    task: str
    n: int
    accuracy: float
    standard_error: float | None
    choice_accuracy: float | None
    log_prob: float


@dataclass(frozen=True)
class ModelResult:
    """All results of one model; `memory` is what the process grew by at its peak, in bytes, None where not known."""

    name: str
    tasks: tuple[TaskResult, ...]
    accuracy: float
    standard_error: float | None
    n_bytes: int
    memory: int | None
    seconds_per_answer: float


@dataclass(frozen=True)
class Difference:
    """Accuracy of a model minus that of the first model on the same rows, with a 95 % interval by bootstrap.

    Task None is the mean over tasks.
    """

    model: str
    task: str | None
    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Report:
    """Results of all models, and how all others differ from the first."""

    models: tuple[ModelResult, ...]
    differences: tuple[Difference, ...]


def task_result(task: str, scores: Sequence[RowScore]) -> TaskResult:
    """Sum up the scores of one task; the standard error is that of a mean of n draws, None for one row."""
    n = len(scores)
    accuracy = sum(score.exact for score in scores) / n
    chosen = [score.chosen_right for score in scores if score.chosen_right is not None]
    return TaskResult(
        task,
        n,
        accuracy,
        math.sqrt(accuracy * (1 - accuracy) / (n - 1)) if n > 1 else None,
        sum(chosen) / n if len(chosen) == n else None,
        sum(score.log_prob for score in scores) / n,
    )


def mean_over_tasks(tasks: Sequence[TaskResult]) -> tuple[float, float | None]:
    """Average accuracies over tasks, each alike, with the standard error of that mean."""
    mean = sum(task.accuracy for task in tasks) / len(tasks)
    errors = [task.standard_error for task in tasks]
    if any(error is None for error in errors):
        return mean, None
    return mean, math.sqrt(sum(error**2 for error in errors if error is not None)) / len(tasks)


def compare(exact: Mapping[str, Mapping[str, Sequence[bool]]], seed: int = 0) -> tuple[Difference, ...]:
    """Compare every model with the first, row by row: `exact` is by model, then task."""
    first, *others = exact
    found: list[Difference] = []
    for model in others:
        draws, means = [], []
        # One generator for all tasks: their draws must not go up and down together.
        generator = np.random.default_rng(seed)
        for task, right in exact[model].items():
            gains = np.asarray(right, np.int64) - np.asarray(exact[first][task], np.int64)
            drawn = _bootstrap(gains, generator)
            found.append(_difference(model, task, float(gains.mean()), drawn))
            draws.append(drawn)
            means.append(float(gains.mean()))
        if len(draws) > 1:
            found.append(_difference(model, None, sum(means) / len(means), np.mean(draws, axis=0)))
    return tuple(found)


def _bootstrap(gains: NDArray[np.int64], generator: np.random.Generator) -> NDArray[np.float64]:
    """Draw means [draws] of as many rows with replacement; only the counts of -1, 0 and 1 matter for a mean."""
    counts = np.array([(gains == value).sum() for value in (-1, 0, 1)])
    drawn = generator.multinomial(len(gains), counts / len(gains), size=_DRAWS)
    means: NDArray[np.float64] = (drawn[:, 2] - drawn[:, 0]) / len(gains)
    return means


def _difference(model: str, task: str | None, mean: float, drawn: NDArray[np.float64]) -> Difference:
    low, high = np.quantile(drawn, [0.025, 0.975]).tolist()
    return Difference(model, task, mean, low, high)


def with_short_names(report: Report) -> Report:
    """Name models by the last part of their path, for a report that travels; as they are where two would be alike."""
    short = {model.name: PurePath(model.name).name for model in report.models}
    if len(set(short.values())) < len(short):
        return report
    models = tuple(replace(model, name=short[model.name]) for model in report.models)
    return Report(models, tuple(replace(found, model=short[found.model]) for found in report.differences))


def as_json(report: Report) -> dict[str, Any]:
    """Give a report as JSON data."""
    return asdict(report)


def cells(report: Report) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Lay a report out as a table of texts: a row for each model, accuracies in per cent with standard errors."""
    tasks = [task.task for task in report.models[0].tasks]
    head = ("model", *(f"{task}#" for task in tasks), "mean#", "disk#", "memory#", "s/answer#")
    rows = [
        (
            model.name,
            *(_share(task.accuracy, task.standard_error, task.choice_accuracy) for task in model.tasks),
            _share(model.accuracy, model.standard_error, None),
            _megabytes(model.n_bytes),
            "" if model.memory is None else _megabytes(model.memory),
            f"{model.seconds_per_answer:.3f}",
        )
        for model in report.models
    ]
    return head, rows


def _share(accuracy: float, error: float | None, chosen: float | None) -> str:
    text = f"{100 * accuracy:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")
    return text if chosen is None else f"{text} ({100 * chosen:.1f})"


def _megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:.0f} MB"


def notes(report: Report) -> list[str]:
    """Say in sentences what the numbers are and how models differ from the first, over all tasks."""
    sizes = ", ".join(f"{task.task} {task.n}" for task in report.models[0].tasks)
    lines = [f"Per cent of rows answered exactly, ± standard error; rows: {sizes}."]
    if any(task.choice_accuracy is not None for task in report.models[0].tasks):
        lines.append("In brackets: per cent of rows whose answer is the most probable of the choices.")
    first = report.models[0].name
    several = len(report.models[0].tasks) > 1
    for found in report.differences:
        if several and found.task is not None:
            continue
        where = found.task or "the mean over tasks"
        low, high = 100 * found.low, 100 * found.high
        lines.append(
            f"{found.model} against {first} on {where}: {100 * found.difference:+.1f} points, "
            f"95 % interval {low:+.1f} to {high:+.1f}."
        )
    return lines


def markdown(report: Report) -> str:
    """Write a report as a Markdown table with notes below."""
    head, rows = cells(report)
    lines = ["| " + " | ".join(column.rstrip("#") for column in head) + " |"]
    lines.append("|" + "|".join("---:" if column.endswith("#") else "---" for column in head) + "|")
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([*lines, "", *notes(report)]) + "\n"
