"""`mediator train`."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mediator_cli.cli.options import JsonOption, QuietOption

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from mediator_cli.evaluate.tasks import Row
    from mediator_cli.moe.train.report import TrainReport
    from mediator_cli.moe.train.run import Mode
    from mediator_cli.moe.train.trainer import Beat


def train(
    folder: Annotated[
        Path, typer.Argument(help="A Mixture of Experts that mediator merged.", metavar="DIR", show_default=False)
    ],
    more: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    rows: Annotated[
        list[str] | None,
        typer.Option("--rows", metavar="[TASK=]FILE…", help="JSON lines of prompt and answer; a task each."),
    ] = None,
    held_out: Annotated[
        list[str] | None,
        typer.Option(
            "--held-out", metavar="[TASK=]FILE", help="Rows to measure on; default: some of --rows, kept from training."
        ),
    ] = None,
    what: Annotated[
        Literal["gates", "attention", "projectors", "all"],
        typer.Option("--what", help="attention: gates too; projectors: of experts of different architectures."),
    ] = "gates",
    steps: Annotated[int, typer.Option("--steps", min=1, help="Number of steps.")] = 300,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Rows of a step.")] = 8,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            "--learning-rate",
            help="Highest learning rate.",
            show_default="gates 1e-2, projectors 5e-4, attention 1e-4, all 2e-5",
        ),
    ] = None,
    length: Annotated[int, typer.Option("--length", min=2, help="Longest row, in tokens; others are left out.")] = 1024,
    share: Annotated[
        list[str] | None, typer.Option("--share", metavar="TASK=SHARE", help="How often a task comes; default: 1 each.")
    ] = None,
    loss_on: Annotated[
        Literal["answer", "text"], typer.Option("--loss-on", help="What is learnt: the answer, or the prompt too.")
    ] = "answer",
    load_balance: Annotated[
        float, typer.Option("--load-balance", min=0.0, help="Weight of Switch's load-balance loss, such as 0.01.")
    ] = 0.0,
    precision: Annotated[
        Literal["bf16", "float32"], typer.Option("--precision", help="Of products; what is trained is float32.")
    ] = "bf16",
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Need less memory and more time: compute states twice.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the order of rows.")] = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the trained model.", show_default=False)
    ] = None,
    in_place: Annotated[bool, typer.Option("--in-place", help="Change DIR itself.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted training.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Throw an interrupted training away.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train the gates of a Mixture of Experts, or more of it, on the experts' data for some hundred steps."""
    target = _target(folder, output, in_place=in_place)
    given = _read("--rows", [*(rows or ()), *(more or ())])
    kept = _read("--held-out", held_out or ())
    from mediator_cli.cli.opening import quiet_transformers
    from mediator_cli.cli.output import Told, print_json
    from mediator_cli.moe.train.report import as_json as json_of
    from mediator_cli.moe.train.run import train as run
    from mediator_cli.moe.train.settings import TrainSettings

    settings = TrainSettings(
        what, steps, learning_rate, batch, length, loss_on, load_balance, _shares(share or ()),
        precision=precision, checkpointing=checkpointing, seed=seed,
    )  # fmt: skip
    quiet_transformers()
    mode: Mode = "resume" if resume else "overwrite" if overwrite else "new"
    with _bars(quiet or as_json) as hear:
        report = run(folder, given, target, settings, held_out=kept, mode=mode, hear=hear)
    Told(quiet).tell(*report.notices)
    if as_json:
        print_json({"folder": str(target), **json_of(report)})
    elif not quiet:
        _print(report, target)


def _target(folder: Path, output: Path | None, *, in_place: bool) -> Path:
    from mediator_cli.errors import MediatorError, Problem

    if (output is None) == (not in_place):
        message = "both are given" if in_place else "nothing says where the trained model goes"
        raise MediatorError(Problem("-o, --in-place", message, "give -o OUT, or --in-place to change DIR itself"))
    return folder if output is None else output


def _read(option: str, texts: Sequence[str]) -> dict[str, tuple[Row, ...]]:
    """Read the rows of each file: TASK=FILE, or named by the file's name up to the first dot."""
    from mediator_cli.errors import MediatorError, Problem
    from mediator_cli.evaluate.tasks import load_tasks

    found: dict[str, tuple[Row, ...]] = {}
    problems: list[Problem] = []
    for text in texts:
        name, is_named, file = text.partition("=")
        path = Path(file if is_named else text)
        name = name if is_named else path.name.split(".")[0]
        if not name or name in found:
            message = f"a second task '{name}'" if name else "has no name"
            problems.append(Problem(f"{option} {text}", message, f"give {option} TASK=FILE"))
            continue
        try:
            found[name] = load_tasks([path])[0].rows
        except MediatorError as error:
            problems += error.problems
    if problems:
        raise MediatorError(problems)
    return found


def _shares(texts: Sequence[str]) -> dict[str, float]:
    from mediator_cli.errors import MediatorError, Problem

    found: dict[str, float] = {}
    for text in texts:
        name, _, number = text.partition("=")
        try:
            found[name] = float(number)
        except ValueError:
            raise MediatorError(Problem(f"--share {text}", "is no share", "give TASK=SHARE, such as maths=2")) from None
    return found


@contextmanager
def _bars(quiet: bool) -> Iterator[Callable[[Beat], None]]:
    """Show steps, loss, tokens a second and time left on a terminal; nothing elsewhere."""
    if quiet or not sys.stderr.isatty():
        yield lambda beat: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    from mediator_cli.cli.output import console

    text = (TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[facts]}"))
    known: dict[str, TaskID] = {}
    with Progress(*text, TimeRemainingColumn(), console=console(stderr=True)) as bars:

        def show(beat: Beat) -> None:
            if beat.stage not in known:
                known[beat.stage] = bars.add_task(beat.stage, total=beat.total, facts="")
            loss = "" if beat.loss is None else f"loss {beat.loss:.3f}"
            speed = "" if beat.tokens_per_second is None else f"{beat.tokens_per_second:.0f} tokens/s"
            bars.update(known[beat.stage], completed=beat.done, facts=f"{loss} {speed}".strip())

        yield show


def _print(report: TrainReport, target: Path) -> None:
    from mediator_cli.cli.output import print_table, say

    measured = [
        (
            task,
            str(report.tasks[task].drawn if task in report.tasks else 0),
            str(after.rows),
            *(f"{found.loss:.3f}" for found in (report.before[task], after)),
            *(f"{found.exact:.1%}" for found in (report.before[task], after)),
        )
        for task, after in report.after.items()
    ]
    if measured:
        columns = ("task", "trained on#", "held out#", "loss before#", "after#", "exact before#", "after#")
        print_table(columns, measured)
        say("loss: nats a token of the held-out rows; exact: rows whose every token is the likeliest")
    speed = report.tokens / report.seconds if report.seconds else 0.0
    say(
        f"trained {report.n_trained:,} of {report.n_parameters:,} parameters ({report.settings.what}) in "
        f"{len(report.losses)} steps: {report.tokens:,} tokens in {report.seconds:.0f} s, {speed:.0f} a second"
    )
    say(f"written to {target}")
