"""Which strategies of a contest are written as bundles, and where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mediator_cli.compare.result import winner_of
from mediator_cli.compare.strategies_run import fit
from mediator_cli.compare.write import write_strategy
from mediator_cli.engine.publish import check_output
from mediator_cli.errors import OutputError, Problem, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from mediator_cli.compare.contest_report import ContestReport
    from mediator_cli.compare.result import Result
    from mediator_cli.compare.strategies_run import Contest
    from mediator_cli.engine.publish import Mode
    from mediator_cli.recipe.compare import LoadedCompare


@dataclass(frozen=True)
class Wanted:
    """Where the best on validation rows is written, and one strategy by what it is called in the table."""

    best: Path | None = None
    named: tuple[str, Path] | None = None
    overwrite: bool = False

    @property
    def mode(self) -> Mode:
        """What may stand there."""
        return "overwrite" if self.overwrite else "new"


def check_wanted(contest: Contest, wanted: Wanted) -> None:
    """Note what is wanted; raise OutputError, before anything runs, where it is unknown or something stands there."""
    names = [entry.label for entry in contest.entries]
    folders = [folder for folder in (wanted.best, wanted.named and wanted.named[1]) if folder]
    if wanted.named and wanted.named[0] not in names:
        message = f"'{wanted.named[0]}' takes no part"
        raise OutputError(Problem("--write", message, did_you_mean(wanted.named[0], names)))
    if len({folder.absolute() for folder in folders}) < len(folders):
        raise OutputError(Problem("--write", "names the folder of --write-best", "choose another"))
    if wanted.best and not all(task.valid or task.is_held_out for task in contest.tasks):
        message = "the best is chosen on validation rows, and not all seen tasks have some"
        raise OutputError(Problem("--write-best", message, "give tasks `valid` rows, or --write STRATEGY DIR"))
    for folder in folders:
        check_output(folder.absolute(), wanted.mode)
    contest.wanted = frozenset([wanted.named[0]] if wanted.named else [])


def write_wanted(contest: Contest, loaded: LoadedCompare, report: ContestReport, wanted: Wanted) -> dict[str, Path]:
    """Write what is wanted; give the folders by the strategies' names.

    Raises OutputError where no strategy has results on validation rows, or the one that is wanted has none.
    """
    written: dict[str, Path] = {}
    for name, folder in _chosen(report, wanted):
        entry = next(entry for entry in contest.entries if entry.label == name)
        result = next(result for result in report.results if result.name == name)
        contest.say(f"write {name}")
        fitted = fit(contest, entry)
        target = folder.absolute()
        write_strategy(contest, loaded, entry, fitted, target, mode=wanted.mode, told=_told(result, report))
        written[name] = folder
    return written


def _chosen(report: ContestReport, wanted: Wanted) -> Iterator[tuple[str, Path]]:
    if wanted.best is not None:
        best = winner_of(report.results)
        if best is None:
            message = "no strategy has results on validation rows"
            raise OutputError(Problem("--write-best", message, "give tasks `valid` rows, or --write STRATEGY DIR"))
        yield best, wanted.best
    if wanted.named is not None:
        reasons = dict(report.failed)
        if wanted.named[0] in reasons:
            raise OutputError(Problem("--write", f"{wanted.named[0]} has no result: {reasons[wanted.named[0]]}"))
        yield wanted.named


def _told(result: Result, report: ContestReport) -> str:
    """Say in a sentence how a strategy did."""
    own = report.conditions
    parts = []
    for mean, what in (
        (result.seen, f"{len(own.seen)} seen tasks"),
        (result.held_out, f"{len(own.held_out)} held-out"),
    ):
        if mean is not None:
            error = f" ± {100 * mean.standard_error:.1f}" if mean.standard_error is not None else ""
            parts.append(f"{100 * mean.accuracy:.1f}{error} % on {what}")
    answered = f"Test rows answered exactly, mean over tasks: {', '.join(parts)}. " if parts else ""
    return f"{answered}{result.cost.passes:.2f} passes of the base for each token."
