"""`mediator push`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mediator_cli.cli.options import JsonOption, QuietOption
from mediator_cli.cli.output import print_json, print_notices, print_table, say
from mediator_cli.recipe.sizes import human_bytes

if TYPE_CHECKING:
    from mediator_cli.export.hub.push import Pushed
    from mediator_cli.export.hub.shipment import Shipment


def push(
    place: Annotated[
        Path, typer.Argument(help="A bundle, merge, adapter or export.", metavar="DIR", show_default=False)
    ],
    repo: Annotated[str, typer.Argument(help="Repository on the Hub: org/name.", metavar="REPO", show_default=False)],
    revision: Annotated[str, typer.Option("--revision", metavar="BRANCH", help="Branch; made where missing.")] = "main",
    message: Annotated[str, typer.Option("--message", "-m", help="Commit message.", show_default=False)] = "",
    public: Annotated[bool, typer.Option("--public", help="Let everybody read it; private otherwise.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Push into a repository that holds files of others.")
    ] = False,
    keep_paths: Annotated[
        bool, typer.Option("--keep-paths", help="Leave paths of this machine in manifest and card as they are.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show files, bytes and card; ask the Hub nothing, send nothing.")
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Push a bundle, or anything else that mediator writes, to the Hugging Face Hub, with its model card."""
    from mediator_cli.cli.progress import shown_progress
    from mediator_cli.export.hub.push import PushJob, check_repo_id
    from mediator_cli.export.hub.push import push as send
    from mediator_cli.export.hub.shipment import make_shipment

    check_repo_id(repo)
    silent = quiet or as_json
    with shown_progress(silent) as progress:
        shipment = make_shipment(place, repo, keep_paths, progress)
    if not silent:
        print_notices(_notices(shipment))
    if dry_run:
        _show_plan(shipment, revision, public=public, as_json=as_json)
        return
    on_terminal = sys.stderr.isatty() and not silent
    job = PushJob(revision, message, public, overwrite, bars=on_terminal)
    # On a terminal the bars of huggingface_hub tell of the upload; a second one would fight with them.
    with shown_progress(silent or on_terminal) as progress:
        pushed = send(shipment, job, progress)
    _show(shipment, pushed, as_json=as_json, quiet=quiet)


def _notices(shipment: Shipment) -> list[str]:
    lines = list(shipment.warnings)
    if shipment.hidden:
        lines.append(f"paths of this machine are shortened in what is pushed: {', '.join(shipment.hidden)}")
    if left_out := shipment.found.left_out:
        more = f" and {len(left_out) - 5} more" if len(left_out) > 5 else ""
        lines.append(f"not part of it, and not pushed: {', '.join(left_out[:5])}{more}")
    return lines


def _show_plan(shipment: Shipment, revision: str, *, public: bool, as_json: bool) -> None:
    files = [{"name": item.name, "bytes": item.n_bytes} for item in shipment.items]
    if as_json:
        facts = {"repo": shipment.repo_id, "revision": revision, "private": not public, "kind": shipment.found.kind}
        left_out = list(shipment.found.left_out)
        print_json({
            **facts, "files": files, "bytes": shipment.n_bytes, "left_out": left_out,
            "paths_hidden_in": list(shipment.hidden), "warnings": list(shipment.warnings), "card": shipment.card,
        })  # fmt: skip
        return
    print_table(("file", "size#"), [(item.name, human_bytes(item.n_bytes)) for item in shipment.items])
    say(f"{shipment.found.kind}, {len(files)} files, {human_bytes(shipment.n_bytes)}")
    say(f"to {shipment.repo_id}, branch {revision}, {'public' if public else 'private'}; nothing was sent")
    say("\nREADME.md:\n")
    say(shipment.card)


def _show(shipment: Shipment, pushed: Pushed, *, as_json: bool, quiet: bool) -> None:
    if as_json:
        print_json({
            "repo": pushed.repo_id, "revision": pushed.revision, "commit": pushed.commit, "url": pushed.url,
            "private": pushed.is_private, "sent": list(pushed.sent), "sent_bytes": pushed.sent_bytes,
            "unchanged": list(pushed.kept), "removed": list(pushed.removed),
            "warnings": [*shipment.warnings, *pushed.notices],
        })  # fmt: skip
    if as_json or quiet:
        return
    print_notices(pushed.notices)
    sent = f"{len(pushed.sent)} files, {human_bytes(pushed.sent_bytes)}" if pushed.sent else "nothing new"
    kept = f"; {len(pushed.kept)} files were there already" if pushed.kept else ""
    removed = f"; {len(pushed.removed)} of the old bundle went" if pushed.removed else ""
    say(f"pushed        {sent}{kept}{removed}")
    say(f"commit        {pushed.commit} on {pushed.revision}, {'private' if pushed.is_private else 'public'}")
    say(f"see           {pushed.url}")
    at = "" if pushed.revision == "main" else f"@{pushed.revision}"
    say(f"Next: mediator pull {pushed.repo_id}{at}")
