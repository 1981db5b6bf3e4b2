"""`mediator init`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mediator_cli.cli.options import JsonOption, OfflineOption
from mediator_cli.cli.output import print_json, print_notices, say, write_text


def init(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="The model that all were tuned from.", show_default=False)
    ],
    experts: Annotated[
        list[str],
        typer.Argument(metavar="EXPERT...", help="Its fine-tunes or adapters, or folders of them.", show_default=False),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the recipe goes.")] = Path("recipe.yaml"),
    prompts: Annotated[
        list[str] | None, typer.Option("--prompts", metavar="NAME=FILE", help="Prompts of an expert; repeatable.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the recipe.")] = False,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
) -> None:
    """Look at a base and its experts, and write a commented recipe that merges them as it is."""
    from mediator_cli.checkpoint.hub.find import Access
    from mediator_cli.cli.run import settings
    from mediator_cli.pipeline.draft.choose import Asked, check_target, draft
    from mediator_cli.pipeline.draft.folders import each_expert
    from mediator_cli.pipeline.draft.text import recipe_text

    check_target(output, force=force)
    sources, folders = zip(*each_expert(experts), strict=True)
    asked = Asked(base, sources, output, tuple(prompts or ()), folders)
    choices, report = draft(asked, settings("2GiB", None), Access(offline))
    write_text(output, recipe_text(choices, report))
    if as_json:
        print_json(report.model_dump(mode="json"))
        return
    print_notices(report.notices)
    say(f"{output} written: {', '.join(expert.name for expert in choices.experts)}; read its comments, then")
    say(f"Next: mediator validate {output}")
