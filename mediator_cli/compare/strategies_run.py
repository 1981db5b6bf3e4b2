"""Fit every strategy of a contest and let it answer all rows, on equal terms; what was found is kept on disk."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from mediator_cli.compare.contest import Answered, load_answered, save_answered
from mediator_cli.compare.costs import cost_of
from mediator_cli.compare.store import row_key
from mediator_cli.errors import MediatorError
from mediator_cli.strategies.bench import open_bench
from mediator_cli.strategies.fitting import run
from mediator_cli.strategies.log_probs import cached_scores
from mediator_cli.strategies.strategy import ByTask

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from mediator_cli.compare.entries import Entry
    from mediator_cli.compare.sources import Sources
    from mediator_cli.errors import Problem
    from mediator_cli.evaluate.score import RowScore
    from mediator_cli.strategies.bench import Bench, TaskRows
    from mediator_cli.strategies.strategy import Fitted

FORMAT = 1
"""Goes up when the same strategy on the same rows would be kept otherwise."""


@dataclass
class Contest:
    """What is compared on what, and where results are kept; the model is loaded when something has to run.

    `version` is that of the program: another may answer otherwise. `fitted` keeps what was fitted of those that are
    `wanted` by label, to be written. `has_asked` tells that what each expert says alone is known by now.
    """

    sources: Sources
    tasks: tuple[TaskRows, ...]
    entries: tuple[Entry, ...]
    folder: Path
    seed: int
    version: str
    wanted: frozenset[str] = frozenset()
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None
    say: Callable[[str], None] = lambda text: None
    opened: Bench | None = None
    fitted: dict[str, Fitted] = field(default_factory=dict)
    has_asked: bool = False

    @property
    def bench(self) -> Bench:
        """The bench, with the model loaded."""
        if self.opened is None:
            self.say("load the base")
            self.opened = open_bench(self.sources.library(), self.tasks, self.seed)
            self.opened.progress = self.progress
        return self.opened

    def file_of(self, entry: Entry) -> Path:
        """Where the results of a strategy are kept: a name of all that they depend on."""
        key = [FORMAT, self.version, self.seed, entry.strategy.name, dict(entry.parameters), self.sources.digest]
        digest = hashlib.sha256(json.dumps([key, rows_digest(self)], sort_keys=True).encode()).hexdigest()[:16]
        return self.folder / "strategies" / f"{entry.strategy.name}-{digest}.json"


def rows_digest(contest: Contest) -> str:
    """Digest what is asked of whom: the base's files, and all rows of all tasks with the tasks' experts."""
    rows = [
        [task.name, task.expert, *([row_key(row) for row in part] for part in (task.train, task.valid, task.test))]
        for task in contest.tasks
    ]
    base = [file.digest for file in contest.sources.files["base"]]
    return hashlib.sha256(json.dumps([base, rows]).encode()).hexdigest()


@dataclass(frozen=True)
class Outcome:
    """What a strategy did, or why it could not."""

    entry: Entry
    answered: Answered | None
    problems: tuple[Problem, ...] = ()


def forget(contest: Contest) -> None:
    """Throw away what earlier runs kept, so that all runs again."""
    for name in ("strategies", "selections"):
        shutil.rmtree(contest.folder / name, ignore_errors=True)


def hold_contest(contest: Contest) -> Iterator[Outcome]:
    """Let strategies answer one by one; what an earlier run found is taken from disk."""
    for at, entry in enumerate(contest.entries, 1):
        file = contest.file_of(entry)
        known = load_answered(file)
        if known is None:
            contest.say(f"{at} of {len(contest.entries)}: {entry.label}")
            try:
                known = _answer(contest, entry)
            except MediatorError as error:
                yield Outcome(entry, None, error.problems)
                continue
            except BaseException as error:
                # What the command line tells of a run that ends early.
                error.add_note(f"goes on: results of {at - 1} of {len(contest.entries)} strategies are kept")
                raise
            save_answered(file, known)
        contest.progress("strategies", at, len(contest.entries))
        yield Outcome(entry, known)


def fit(contest: Contest, entry: Entry) -> Fitted:
    """Fit a strategy, unless this run has; the same every time."""
    if entry.label not in contest.fitted:
        contest.fitted[entry.label] = run(entry.strategy, contest.bench, entry.parameters)
    return contest.fitted[entry.label]


def _answer(contest: Contest, entry: Entry) -> Answered:
    bench = contest.bench
    started = time.monotonic()
    fitted = run(entry.strategy, bench, entry.parameters)
    seconds = time.monotonic() - started
    if entry.label in contest.wanted:
        contest.fitted[entry.label] = fitted
    tasks = [task for task in bench.tasks if _knows(fitted, task)]
    total = sum(len(task.test) + len(task.valid) * (not task.is_held_out) for task in tasks)
    told = _counter(contest, entry.label, total)
    cached = any(each.strategy.group == "ensemble" for each in contest.entries)
    if cached and not contest.has_asked:
        contest.has_asked = True
        contest.say("ask every expert about every row, once for all ensembles")
    scores = {task.name: _scores(bench, fitted, task, "test", told, cached=cached) for task in tasks}
    fit_on = [task for task in tasks if task.valid and not task.is_held_out]
    valid = {task.name: _scores(bench, fitted, task, "valid", told, cached=cached) for task in fit_on}
    return Answered(scores, valid, cost_of(bench, fitted, tasks, seconds), dict(fitted.facts))


def _knows(fitted: Fitted, task: TaskRows) -> bool:
    return not isinstance(fitted.decision, ByTask) or task.name in fitted.decision.weights


def _scores(
    bench: Bench,
    fitted: Fitted,
    task: TaskRows,
    which: Literal["valid", "test"],
    told: Callable[[int], None],
    *,
    cached: bool,
) -> tuple[RowScore, ...]:
    """Score the rows of a task; where ensembles take part, what experts said alone is not asked of them again."""
    known = cached_scores(bench, fitted, task, which) if cached or fitted.combine == "probabilities" else None
    if known is None:
        return tuple(bench.score(fitted, task, getattr(task, which), told))
    told(len(known))
    return tuple(known)


def _counter(contest: Contest, label: str, total: int) -> Callable[[int], None]:
    done = 0

    def advance(n: int) -> None:
        nonlocal done
        done += n
        contest.progress(label, done, total)

    return advance
