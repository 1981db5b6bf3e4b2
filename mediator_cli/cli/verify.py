"""`mediator verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mediator_cli.cli.options import JsonOption
from mediator_cli.cli.output import print_json, print_notices, print_problems, problem_rows, say
from mediator_cli.errors import BundleError, Problem


def verify(
    place: Annotated[str, typer.Argument(help="A bundle.", metavar="DIR", show_default=False)],
    as_json: JsonOption = False,
) -> None:
    """Check every byte of a bundle: digests, shapes, finite values, sparse experts, links."""
    from mediator_cli.bundle.verify import verify_bundle
    from mediator_cli.checkpoint.remote.url import is_url, redacted
    from mediator_cli.cli.progress import shown_progress

    if is_url(place):
        message = "is a URL, and every byte is read from a folder"
        raise BundleError(Problem(redacted(place), message, "copy the bundle to a folder, then name that"))
    folder = Path(place)
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    done = 0
    with shown_progress(as_json) as progress:

        def advance(n: int) -> None:
            nonlocal done
            done += n
            progress("verify", done, total)

        result = verify_bundle(folder, advance)
    if as_json:
        problems = problem_rows(result.problems)
        print_json({"valid": not problems, "problems": problems, "unknown_files": list(result.unknown)})
    else:
        print_problems(result.problems)
        print_notices(f"{name} is not named in the manifest" for name in result.unknown)
    if result.problems:
        raise typer.Exit(2)
    if not as_json:
        say(f"{folder}: {result.n_tensors} tensors, {result.n_sparse} sparse experts, {result.n_files} files intact")
