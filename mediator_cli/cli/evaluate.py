"""`mediator evaluate`."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mediator_cli.cli.mixtures import CombineOption, combination
from mediator_cli.cli.options import JsonOption, OfflineOption, QuietOption
from mediator_cli.cli.output import console, print_json, print_table, say

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from mediator_cli.evaluate.models import Candidate
    from mediator_cli.evaluate.report import Report
    from mediator_cli.runtime.combine import Combine


def evaluate(
    names: Annotated[
        list[str],
        typer.Argument(
            help="Models, adapters, bundles; BUNDLE::EXPERT, BUNDLE::dense and BUNDLE::oracle are parts of one.",
            metavar="MODEL…",
            show_default=False,
        ),
    ],
    tasks: Annotated[
        list[Path] | None,
        typer.Option("--tasks", metavar="FILE…", help="JSON lines of prompt, answer and choices; a task each."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="First rows of each task.", show_default=False)
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", metavar="MODEL", help="The base of adapters.", show_default=False)
    ] = None,
    combine: CombineOption = None,
    raw: Annotated[bool, typer.Option("--raw", help="Ask without the chat template.")] = False,
    harness: Annotated[
        str | None,
        typer.Option(
            "--harness",
            metavar="TASKS",
            help="Tasks of lm-evaluation-harness, or mediator_exact and mediator_choice on the files of --tasks.",
            show_default=False,
        ),
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", metavar="FILE", help="Write the table here too.", show_default=False)
    ] = None,
    card: Annotated[bool, typer.Option("--card", help="Write the table into the README.md of the bundles.")] = False,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure models on tasks: accuracy, memory, time; the same for bundles, their experts, and plain models."""
    from mediator_cli.checkpoint.hub.find import Access
    from mediator_cli.evaluate.models import find_candidates
    from mediator_cli.evaluate.tasks import load_tasks

    models, files = sorted_out(names, tasks or [])
    how = combination(combine)
    if harness is not None:
        candidates = _combined(find_candidates(models, [], base, Access(offline)), how)
        _download(candidates, quiet or as_json)
        _harness(candidates, harness.split(","), files, limit, as_json)
        return
    loaded = load_tasks(_some(files))
    candidates = _combined(find_candidates(models, [task.name for task in loaded], base, Access(offline)), how)
    _download(candidates, quiet or as_json)
    from mediator_cli.cli.opening import quiet_transformers
    from mediator_cli.evaluate.run import EvaluateSettings
    from mediator_cli.evaluate.run import evaluate as run
    from mediator_cli.evaluate.score import ScoreSettings

    quiet_transformers()
    with _progress(quiet or as_json) as progress:
        report = run(candidates, loaded, EvaluateSettings(limit, ScoreSettings(raw=raw), progress))
    show_report(report, as_json)
    _write(report, candidates, markdown, card)


def sorted_out(names: Sequence[str], tasks: Sequence[Path]) -> tuple[list[str], list[Path]]:
    """Move files of rows from the models to the tasks: the shell writes `--tasks *.jsonl` as one task and the rest."""
    files = [Path(name) for name in names if name.endswith(".jsonl") and Path(name).is_file()]
    return [name for name in names if Path(name) not in files], [*tasks, *files]


def _combined(candidates: Sequence[Candidate], combine: Combine | None) -> tuple[Candidate, ...]:
    return tuple(replace(candidate, combine=combine) for candidate in candidates)


def _some(files: Sequence[Path]) -> Sequence[Path]:
    from mediator_cli.errors import MediatorError, Problem

    if not files:
        raise MediatorError(Problem("--tasks", "there is nothing to answer", "give files of rows: --tasks FILE"))
    return files


def _download(candidates: Sequence[Candidate], quiet: bool) -> None:
    from mediator_cli.cli.progress import shown_progress
    from mediator_cli.evaluate.models import download_candidates

    with shown_progress(quiet) as progress:
        download_candidates(candidates, progress)


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Show rows done and time left for each model on a terminal; nothing elsewhere."""
    if quiet or not sys.stderr.isatty():
        yield lambda stage, done, total: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    known: dict[str, TaskID] = {}
    with Progress(*columns, console=console(stderr=True)) as bars:

        def show(stage: str, done: int, total: int) -> None:
            if stage not in known:
                known[stage] = bars.add_task(stage.replace("[", "\\["), total=total)
            bars.update(known[stage], completed=done)

        yield show


def show_report(report: Report, as_json: bool) -> None:
    """Print a report as a table with notes, or as JSON."""
    from mediator_cli.evaluate.report import as_json as json_of
    from mediator_cli.evaluate.report import cells, notes

    if as_json:
        print_json(json_of(report))
        return
    print_table(*cells(report))
    for line in notes(report):
        say(line)


def _write(report: Report, candidates: Sequence[Candidate], markdown: Path | None, card: bool) -> None:
    from mediator_cli.evaluate.card import write_results
    from mediator_cli.evaluate.report import markdown as markdown_of
    from mediator_cli.evaluate.report import with_short_names

    write_markdown(report, markdown)
    if card:
        for folder in dict.fromkeys(item.path for item in candidates if item.kind == "bundle"):
            write_results(folder, markdown_of(with_short_names(report)))


def write_markdown(report: Report, file: Path | None) -> None:
    """Write a report as Markdown where a file is given; raise OutputError when that fails."""
    from mediator_cli.checkpoint.write import write_error
    from mediator_cli.evaluate.report import markdown as markdown_of

    if file is None:
        return
    try:
        file.write_text(markdown_of(report), encoding="utf-8")
    except OSError as error:
        raise write_error(file, error) from None


def _harness(
    candidates: Sequence[Candidate], names: Sequence[str], files: Sequence[Path], limit: int | None, as_json: bool
) -> None:
    from mediator_cli.cli.opening import quiet_transformers
    from mediator_cli.errors import MediatorError, Problem

    try:
        import lm_eval  # noqa: F401
    except ImportError:
        hint = "pip install 'mediator-merge[eval]'"
        raise MediatorError(Problem("--harness", "lm-evaluation-harness is not installed", hint)) from None
    from mediator_cli.evaluate.harness import harness_results

    quiet_transformers()
    found: dict[str, dict[str, Any]] = {
        candidate.name: harness_results(candidate, names, files, limit) for candidate in candidates
    }
    if as_json:
        print_json(found)
        return
    rows = [
        (model, task, name.split(",")[0], f"{value:.4f}")
        for model, tasks in found.items()
        for task, result in tasks.items()
        for name, value in result.items()
        if isinstance(value, float)
    ]
    print_table(("model", "task", "metric", "value#"), rows)
