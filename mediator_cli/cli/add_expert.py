"""`mediator add-expert`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mediator_cli.cli.changes import print_change
from mediator_cli.cli.options import JsonOption, MemoryOption, OfflineOption, QuietOption, WorkersOption

if TYPE_CHECKING:
    from collections.abc import Sequence

BundleArgument = Annotated[Path, typer.Argument(help="A bundle, which is changed.", metavar="DIR", show_default=False)]
NoRouterOption = Annotated[
    bool, typer.Option("--no-router", help="Leave the bundle without a router; `fit-router` fits one later.")
]


def add_expert(
    folder: BundleArgument,
    name: Annotated[str, typer.Option("--name", help="Name of the new expert.", show_default=False)],
    model: Annotated[
        str,
        typer.Option(
            "--model", help="A checkpoint or a LoRA adapter: a folder, or ORG/NAME[@REVISION].", show_default=False
        ),
    ],
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            "--prompts",
            metavar="[NAME=]FILE",
            help="JSON lines with a `prompt` each, of the new expert's task. With NAME= those of another expert, "
            "where the file that the bundle notes is gone; repeatable.",
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base", help="The base of an adapter, where the path that the bundle notes is gone.", show_default=False
        ),
    ] = None,
    no_router: NoRouterOption = False,
    memory: MemoryOption = "2GiB",
    workers: WorkersOption = None,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Add an expert to a finished bundle and to its router, without touching those that are there."""
    from mediator_cli.checkpoint.hub.find import Access
    from mediator_cli.cli.output import Told
    from mediator_cli.cli.progress import shown_progress
    from mediator_cli.cli.run import settings
    from mediator_cli.pipeline.change.newcomer import Newcomer
    from mediator_cli.pipeline.change.run import add_expert as carry_out

    files = prompt_files(prompts or (), name, known_experts(folder))
    started = time.monotonic()
    with shown_progress(quiet) as progress:
        run = settings(memory, workers, progress=progress)
        new = Newcomer(name, model, base)
        changed = carry_out(folder, new, files, router=not no_router, access=Access(offline), run=run)
    Told(quiet).tell(*changed.notices)
    print_change(folder, changed, time.monotonic() - started, as_json=as_json, quiet=quiet)


def known_experts(folder: Path) -> list[str]:
    """Name the experts of a bundle."""
    from mediator_cli.bundle.manifest import read_manifest

    return [source.name for source in read_manifest(folder).experts]


def prompt_files(texts: Sequence[str], new: str | None, known: Sequence[str]) -> dict[str, Path]:
    """Split [NAME=]FILE; a file without a name is the newcomer's. Raises BundleError for one that is nobody's."""
    from mediator_cli.errors import BundleError, Problem, did_you_mean

    found: dict[str, Path] = {}
    names = [*known, *([new] if new is not None else [])]
    for text in texts:
        name, separator, file = text.partition("=")
        owner, path = (name, Path(file)) if separator and name in names else (new, Path(text))
        if owner is None:
            hint = did_you_mean(name, names) if separator else "write --prompts NAME=FILE"
            raise BundleError(Problem("--prompts", f"'{text}' is not NAME=FILE of an expert", hint))
        if owner in found:
            raise BundleError(Problem("--prompts", f"two files are given for {owner}", "give one"))
        found[owner] = path
    return found
