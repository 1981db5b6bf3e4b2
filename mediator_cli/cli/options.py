"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipeArgument = Annotated[Path, typer.Argument(help="The recipe, a YAML file.", metavar="RECIPE", show_default=False)]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Override a field, such as assign.rule=all; repeatable."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for other programs.")]
MemoryOption = Annotated[str, typer.Option("--memory", metavar="SIZE", help="Most memory to use, such as 2GiB.")]
WorkersOption = Annotated[
    int | None, typer.Option("--workers", min=1, help="Worker threads; default: one per core.", show_default=False)
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
OfflineOption = Annotated[
    bool, typer.Option("--offline", help="Ask the Hub nothing: take its models from the cache alone.")
]
