"""`mediator remove-expert`."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from mediator_cli.cli.add_expert import BundleArgument, NoRouterOption, known_experts, prompt_files
from mediator_cli.cli.changes import print_change
from mediator_cli.cli.options import JsonOption, QuietOption


def remove_expert(
    folder: BundleArgument,
    name: Annotated[str, typer.Option("--name", help="The expert to take out.", show_default=False)],
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            "--prompts",
            metavar="NAME=FILE",
            help="Prompts of an expert, where the file that the bundle notes is gone; repeatable.",
        ),
    ] = None,
    no_router: NoRouterOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Take an expert out of a finished bundle and out of its router; all else stays as it is."""
    from mediator_cli.cli.output import Told
    from mediator_cli.pipeline.change.run import remove_expert as carry_out

    files = prompt_files(prompts or (), None, known_experts(folder))
    started = time.monotonic()
    changed = carry_out(folder, name, files, router=not no_router)
    Told(quiet).tell(*changed.notices)
    print_change(folder, changed, time.monotonic() - started, as_json=as_json, quiet=quiet)
