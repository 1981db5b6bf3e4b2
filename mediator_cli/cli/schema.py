"""`mediator schema`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from mediator_cli.cli.output import print_json


class SchemaKind(StrEnum):
    """What a schema describes."""

    recipe = "recipe"
    heterogeneous = "heterogeneous"
    compare = "compare"
    manifest = "manifest"
    conflicts = "conflicts"


def schema(
    kind: Annotated[SchemaKind, typer.Argument(help="Which format.", show_default=True)] = SchemaKind.recipe,
) -> None:
    """Print the JSON schema of a recipe, one of kind heterogeneous_moe or compare, a manifest or a conflict report."""
    if kind is SchemaKind.recipe:
        from mediator_cli.plan.schema import recipe_schema

        print_json(recipe_schema())
        return
    if kind is SchemaKind.heterogeneous:
        from mediator_cli.recipe.heterogeneous import heterogeneous_schema

        print_json(heterogeneous_schema())
        return
    if kind is SchemaKind.compare:
        from mediator_cli.recipe.compare import compare_schema

        print_json(compare_schema())
        return
    from mediator_cli.bundle.conflict_report import ConflictReport
    from mediator_cli.bundle.manifest import Manifest

    print_json((Manifest if kind is SchemaKind.manifest else ConflictReport).model_json_schema())
