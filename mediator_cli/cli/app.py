"""The `mediator` command: its subcommands, and the one place where errors become exit codes.

Exit codes: 0 done, 2 the user can mend it, 1 a defect of this program, 130 interrupted.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from mediator_cli.cli.ablate import ablate
from mediator_cli.cli.analyze_conflicts import analyze_conflicts
from mediator_cli.cli.chat import chat
from mediator_cli.cli.evaluate import evaluate
from mediator_cli.cli.fit_router import fit_router
from mediator_cli.cli.generate import generate
from mediator_cli.cli.init import init
from mediator_cli.cli.inspect import inspect
from mediator_cli.cli.merge import merge
from mediator_cli.cli.methods import methods
from mediator_cli.cli.plan import plan
from mediator_cli.cli.route import route
from mediator_cli.cli.schema import schema
from mediator_cli.cli.validate import validate
from mediator_cli.cli.verify import verify
from mediator_cli.errors import MediatorError

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
    merge,
    inspect,
    verify,
    fit_router,
    route,
    generate,
    chat,
    evaluate,
    ablate,
    methods,
    schema,
):
    app.command(command.__name__.replace("_", "-"))(command)


def main() -> None:
    """Run the command line and exit."""
    try:
        app()
    except MediatorError as error:
        from mediator_cli.cli.output import print_problems

        print_problems(error.problems)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("interrupted; nothing was written", err=True)
        sys.exit(130)
    except Exception:  # noqa: BLE001 - the last frame: say whose fault it is, keep the traceback
        import traceback

        traceback.print_exc()
        typer.echo("this is a defect of mediator, not of your recipe; please report it with the lines above", err=True)
        sys.exit(1)
