"""The charts of a contest as data: accuracy against time and memory, and against the number of experts kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mediator_cli.cli.scatter import Axis, Spot, cost_axis, linear_axis, on_front

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mediator_cli.compare.contest_report import ContestReport
    from mediator_cli.compare.result import Kept, Result

COLOURS = {
    "reference": ("#6b6660", "#b1aba3"),
    "ensemble": ("#1c63a8", "#7db4ee"),
    "merge": ("#b8400e", "#ff9a5c"),
    "route": ("#2a7a3b", "#7fd18f"),
}
"""Colours of the groups, on light and on dark ground."""
SHAPES = {"reference": "diamond", "ensemble": "square", "merge": "triangle", "route": "disc"}
Y_NAME = "answered exactly on seen tasks, %"


@dataclass(frozen=True)
class Chart:
    """One scatter: its title, the names of its axes, and the points."""

    title: str
    x_name: str
    spots: tuple[Spot, ...]
    x: Axis
    y: Axis


@dataclass(frozen=True)
class Curve:
    """Accuracy by the number of experts kept, for one selector."""

    name: str
    points: tuple[tuple[int, float], ...]


def scatters(report: ContestReport) -> list[Chart]:
    """Give the scatters for which there are numbers."""
    seconds = [(each, 1000 * each.cost.seconds) for each in report.results if each.cost.seconds and each.seen]
    held = [(each, (report.conditions.base_bytes + each.cost.n_bytes) / 1e6) for each in report.results if each.seen]
    found = []
    if seconds:
        found.append(_chart("Accuracy against time", "milliseconds for an answer", seconds))
    if held:
        found.append(_chart("Accuracy against memory", "megabytes held, base and experts", held))
    return found


def _chart(title: str, x_name: str, costs: Sequence[tuple[Result, float]]) -> Chart:
    ys = [100 * each.seen.accuracy if each.seen else 0.0 for each, _ in costs]
    # References are there to compare with: whoever is told the task of a prompt beats nobody.
    usable = [(x, y) for (each, x), y in zip(costs, ys, strict=True) if not each.is_reference]
    front = iter(on_front(usable))
    spots = tuple(
        Spot(each.name, each.group, x, y, _points(each), not each.is_reference and next(front))
        for (each, x), y in zip(costs, ys, strict=True)
    )
    return Chart(title, x_name, spots, cost_axis([x for _, x in costs]), linear_axis(ys, least=2, most=100))


def _points(result: Result) -> float | None:
    error = result.seen.standard_error if result.seen else None
    return None if error is None else 100 * error


def curves(kept: Sequence[Kept], kind: str) -> list[Curve]:
    """Give the curves of one kind of answering, a selector each."""
    found: dict[str, list[tuple[int, float]]] = {}
    for each in kept:
        if each.kind == kind and each.seen is not None:
            found.setdefault(each.selector, []).append((each.k, 100 * each.seen.accuracy))
    return [Curve(name, tuple(sorted(points))) for name, points in found.items()]
