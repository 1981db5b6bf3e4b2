"""What a fitted strategy costs when it answers: counted in passes and bytes, measured in seconds and memory."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from mediator_cli.compare.contest import Cost
from mediator_cli.evaluate.memory import peak_bytes, resident_bytes, start_peak
from mediator_cli.runtime.gates import Gates
from mediator_cli.runtime.router import Router
from mediator_cli.runtime.tokens import prompt_tokens
from mediator_cli.strategies.library import count_bytes
from mediator_cli.strategies.strategy import ByTask, Fixed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mediator_cli.evaluate.tasks import Row
    from mediator_cli.strategies.bench import Bench, TaskRows
    from mediator_cli.strategies.strategy import Fitted

TIMED_ROWS = 32
"""Rows that are answered for the clock, shared among the tasks: the same ones for all strategies."""
_TURNS = 2
"""Times that they are answered; the fastest counts."""


def cost_of(bench: Bench, fitted: Fitted, tasks: Sequence[TaskRows], fit_seconds: float) -> Cost:
    """Count and measure the cost of answering; `fit_seconds` is what fitting took."""
    seconds, memory = _measure(bench, fitted, tasks)
    n_bytes = sum(map(count_bytes, fitted.experts.values())) + _decision_bytes(fitted)
    return Cost(_passes(bench, fitted, tasks), n_bytes, fit_seconds, seconds, memory)


def _decision_bytes(fitted: Fitted) -> int:
    """Count the bytes of what decides on the mixture."""
    decision = fitted.decision
    if isinstance(decision, Gates):
        return sum(gate.directions.nbytes + gate.bias.nbytes for gate in decision.by_name.values())
    if isinstance(decision, Router):
        parts = [part for part in (decision.classifier, decision.outside_model) if part is not None]
        arrays = [value for part in parts for value in vars(part).values() if hasattr(value, "nbytes")]
        return sum(array.size * 4 for array in arrays)
    return 0


def _passes(bench: Bench, fitted: Fitted, tasks: Sequence[TaskRows]) -> float:
    """Average over tasks the products with the base's weights that a token needs, counted in weights multiplied."""
    whole = sum(parameter.numel() for parameter in bench.model.parameters())
    shares = {
        name: sum(d.a.numel() + d.b.numel() for d in own.values()) / whole for name, own in fitted.experts.items()
    }
    if isinstance(fitted.decision, Gates):
        rule, gates = fitted.decision.rule, fitted.decision.by_name.values()
        kept = min(rule.top_k or len(shares), len(shares)) / max(1, len(shares))
        return 1 + kept * sum(shares.values()) + sum(gate.directions.numel() for gate in gates) / whole
    means = []
    for task in tasks:
        used = [_pass_count(fitted, shares, mixture) for mixture in _mixtures(bench, fitted, task)]
        means.append(sum(used) / len(used))
    return sum(means) / len(means)


def _pass_count(fitted: Fitted, shares: Mapping[str, float], mixture: Mapping[str, float]) -> float:
    members = [name for name, weight in mixture.items() if weight]
    products = sum(shares[name] for name in members)
    return products + (1 if fitted.combine == "parameters" else max(1, len(members)))


def _mixtures(bench: Bench, fitted: Fitted, task: TaskRows) -> Iterator[Mapping[str, float]]:
    """Give the mixtures that answer a task: one, or that of each test row where a router reads it."""
    decision = fitted.decision
    if isinstance(decision, Router):
        with bench.answering(fitted) as model:
            ids = [prompt.ids for prompt in prompt_tokens(bench.tokenizer, [row.prompt for row in task.test])]
            routing = model.route(ids)
        yield from (dict(zip(routing.experts, row, strict=True)) for row in routing.weights.tolist())
    elif isinstance(decision, Fixed):
        yield decision.weights
    elif isinstance(decision, ByTask):
        yield decision.weights[task.name]


def _measure(bench: Bench, fitted: Fitted, tasks: Sequence[TaskRows]) -> tuple[float, int | None]:
    """Answer the timed rows; give seconds for one of them, and the most bytes that the process grew by."""
    known = timed_rows(bench.tasks)
    rows = [(task, known[task.name]) for task in tasks]
    before = resident_bytes()
    start_peak()
    fastest = min(_answer_all(bench, fitted, rows) for _ in range(_TURNS))
    peak = peak_bytes()
    grown = None if peak is None or before is None else max(0, peak - before)
    return fastest / sum(len(own) for _, own in rows), grown


def timed_rows(tasks: Sequence[TaskRows]) -> dict[str, tuple[Row, ...]]:
    """Choose the rows that are answered for the clock: the first test rows of every task."""
    each = max(1, TIMED_ROWS // len(tasks))
    return {task.name: task.test[:each] for task in tasks}


def _answer_all(bench: Bench, fitted: Fitted, rows: Sequence[tuple[TaskRows, Sequence[Row]]]) -> float:
    started = time.monotonic()
    for task, own in rows:
        bench.score(fitted, task, own)
    return time.monotonic() - started
