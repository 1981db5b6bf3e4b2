"""`mediator validate`."""

from __future__ import annotations

import typer

from mediator_cli.cli.heterogeneous import validate_heterogeneous
from mediator_cli.cli.options import JsonOption, OfflineOption, RecipeArgument, SetOption
from mediator_cli.cli.output import print_json, print_notices, problem_rows, say


def validate(
    recipe: RecipeArgument, changes: SetOption = None, offline: OfflineOption = False, as_json: JsonOption = False
) -> None:
    """Check a recipe and its checkpoints: every problem at once, from headers and configs alone."""
    from mediator_cli.checkpoint.hub.collections import collection_lister
    from mediator_cli.checkpoint.hub.find import Access
    from mediator_cli.errors import MediatorError
    from mediator_cli.pipeline.routable import check_routing
    from mediator_cli.plan.make import make_plan
    from mediator_cli.recipe.heterogeneous import is_heterogeneous_recipe
    from mediator_cli.recipe.load import load_partly

    access = Access(offline)
    try:
        if is_heterogeneous_recipe(recipe, changes or ()):
            validate_heterogeneous(recipe, changes or (), offline=offline, as_json=as_json)
            return
        plan = check_routing(make_plan(load_partly(recipe, changes or (), collection_lister(access)), access))
    except MediatorError as error:
        if not as_json:
            raise
        print_json({"valid": False, "problems": problem_rows(error.problems)})
        raise typer.Exit(2) from None
    if as_json:
        print_json({"valid": True, "problems": [], "notices": list(plan.notices)})
        return
    print_notices(plan.notices)
    say(f"{recipe} is valid: {len(plan.experts)} experts, {len(plan.tensors)} tensors, {len(plan.units)} units.")
    say(f"Next: mediator plan {recipe}")
