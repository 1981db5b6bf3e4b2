"""`mediator pull`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mediator_cli.cli.options import JsonOption, OfflineOption, QuietOption
from mediator_cli.cli.output import print_json, say, shown_folder
from mediator_cli.recipe.sizes import human_bytes

if TYPE_CHECKING:
    from mediator_cli.export.hub.pull import Pulled


def pull(
    source: Annotated[str, typer.Argument(help="org/name, or org/name@revision.", metavar="REPO", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Folder; default ./name.", show_default=False)
    ] = None,
    cache: Annotated[
        bool, typer.Option("--cache", help="Keep it in the Hub's cache, and name the folder there.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a bundle that stands there.")] = False,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Fetch a bundle from the Hugging Face Hub, only the files of its manifest, and check every byte."""
    from mediator_cli.checkpoint.hub.find import is_hub_id
    from mediator_cli.cli.progress import shown_progress
    from mediator_cli.errors import OutputError, Problem
    from mediator_cli.export.hub.pull import pull as fetch

    if not is_hub_id(source):
        raise OutputError(Problem(source, "is no name of a Hub repository", "write org/name or org/name@revision"))
    if cache and output is not None:
        raise OutputError(Problem("--cache", "keeps it in the cache, and -o names another folder", "give one of both"))
    target = None if cache else output or Path(source.partition("@")[0].rpartition("/")[2])
    with shown_progress(quiet or as_json) as progress:
        pulled = fetch(source, target, overwrite, offline, progress)
    if as_json:
        _print_json(pulled)
    elif not quiet:
        _print(pulled)


def _print_json(pulled: Pulled) -> None:
    print_json({
        "repo": pulled.source, "commit": pulled.commit, "folder": str(pulled.folder), "kind": pulled.kind,
        "files": list(pulled.names), "bytes": pulled.n_bytes, "left_out": list(pulled.left_out),
    })  # fmt: skip


def _print(pulled: Pulled) -> None:
    place = shown_folder(pulled.folder)
    say(f"pulled        {pulled.kind} of {len(pulled.names)} files, {human_bytes(pulled.n_bytes)}, to {place}")
    say(f"commit        {pulled.commit}")
    if pulled.left_out:
        shown = ", ".join(pulled.left_out[:5]) + (f" and {len(pulled.left_out) - 5} more" * (len(pulled.left_out) > 5))
        say(f"left there    {shown}: not part of it")
    say(f"Next: {_next(pulled.kind, place)}")


def _next(kind: str, place: str) -> str:
    if kind == "bundle":
        return f"mediator generate {place} '…'   ·   mediator serve {place}   ·   mediator inspect {place}"
    if kind in ("adapter", "export"):
        return f"mediator inspect {place}   ·   load it with PEFT, or serve it with vLLM"
    return f"mediator inspect {place}   ·   AutoModelForCausalLM.from_pretrained loads it"
