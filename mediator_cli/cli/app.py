"""The `mediator` command: its subcommands, and the one place where errors become exit codes.

Exit codes: 0 done, 2 the user can mend it, 1 a defect of this program, 130 interrupted, 143 terminated,
141 where nobody reads the output any more.
"""

from __future__ import annotations

import errno
import gc
import os
import shlex
import signal
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from mediator_cli.cli.ablate import ablate
from mediator_cli.cli.add_expert import add_expert
from mediator_cli.cli.analyze_conflicts import analyze_conflicts
from mediator_cli.cli.chat import chat
from mediator_cli.cli.compare import compare
from mediator_cli.cli.compress_moe import compress_moe
from mediator_cli.cli.evaluate import evaluate
from mediator_cli.cli.export import export
from mediator_cli.cli.extract_lora import extract_lora
from mediator_cli.cli.fit_router import fit_router
from mediator_cli.cli.gates import gates
from mediator_cli.cli.generate import generate
from mediator_cli.cli.init import init
from mediator_cli.cli.inspect import inspect
from mediator_cli.cli.kinship import kinship
from mediator_cli.cli.merge import merge
from mediator_cli.cli.methods import methods
from mediator_cli.cli.plan import plan
from mediator_cli.cli.pull import pull
from mediator_cli.cli.push import push
from mediator_cli.cli.remove_expert import remove_expert
from mediator_cli.cli.route import route
from mediator_cli.cli.schema import schema
from mediator_cli.cli.serve import serve
from mediator_cli.cli.train import train
from mediator_cli.cli.validate import validate
from mediator_cli.cli.verify import verify
from mediator_cli.errors import MediatorError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

app = typer.Typer(
    name="mediator",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"mediator {version('mediator-merge')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Merge fine-tuned language models: average the layers that agree, route the layers that fight."""


for command in (
    init,
    validate,
    plan,
    analyze_conflicts,
    kinship,
    merge,
    extract_lora,
    gates,
    train,
    compress_moe,
    inspect,
    verify,
    fit_router,
    add_expert,
    remove_expert,
    route,
    generate,
    chat,
    serve,
    evaluate,
    ablate,
    compare,
    export,
    push,
    pull,
    methods,
    schema,
):
    app.command(command.__name__.replace("_", "-"))(command)


_INTERRUPTED, _TERMINATED, _UNREAD = 128 + signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGPIPE


def main() -> None:
    """Run the command line and exit."""
    # Most of what a short command makes is modules, which stay: looking for garbage among them takes a tenth of it.
    gc.set_threshold(100_000, 20, 20)
    with _termination_heard() as terminated:
        code = _run()
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = _unread()
    sys.exit(_TERMINATED if code == _INTERRUPTED and terminated else code)


@contextmanager
def _termination_heard() -> Iterator[list[int]]:
    """Let SIGTERM end a command as Ctrl-C does; gives a list that is not empty once it came."""
    came: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        came.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, before)


def _run() -> int:
    """Run the command and say how it ended; return the exit code."""
    try:
        app()
    except SystemExit as end:
        return _ended(end)
    except MediatorError as error:
        from mediator_cli.cli.output import print_problems

        print_problems(error.problems)
        _tell_kept("stopped", error)
        return 2
    except KeyboardInterrupt as error:
        return _interrupted(error)
    except Exception as error:  # noqa: BLE001 - the last frame: say whose fault it is, keep the traceback
        return _failed(error)
    return 0


def _ended(end: SystemExit) -> int:
    """Return the exit code of a command; typer has made one of an interrupt and of a reader that went away."""
    if end.code == _INTERRUPTED:
        return _interrupted(end)
    if any(isinstance(cause, BrokenPipeError) for cause in _causes(end)):
        return _unread()
    return end.code if isinstance(end.code, int) else int(end.code is not None)


def _failed(error: Exception) -> int:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        typer.echo(f"error: cannot write the output: {(error.strerror or '').lower()}", err=True)
        return 2
    import traceback

    traceback.print_exception(error)
    typer.echo("this is a defect of mediator, not of your recipe; please report it with the lines above", err=True)
    _tell_kept("stopped", error)
    return 1


def _unread() -> int:
    # What Python would still write at its exit goes where nobody minds.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return _UNREAD


def _interrupted(error: BaseException) -> int:
    if not _tell_kept("interrupted", error):
        typer.echo("interrupted; nothing was written", err=True)
    return _INTERRUPTED


def _tell_kept(how: str, error: BaseException) -> bool:
    """Say what is finished of a merge that ended early, and how to go on, if something is."""
    notes = [note for cause in _causes(error) for note in getattr(cause, "__notes__", ())]
    kept = [note.removeprefix("kept: ") for note in notes if note.startswith("kept: ")]
    if going := [note.removeprefix("goes on: ") for note in notes if note.startswith("goes on: ")]:
        typer.echo(f"{how}; {going[0]}, the same command goes on", err=True)
        return True
    if not kept:
        return False
    words = [word for word in sys.argv[1:] if word != "--resume"]
    command = shlex.join(["mediator", *words, "--resume"])
    typer.echo(f"{how}; {kept[0]}, go on with `{command}`", err=True)
    return True


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
