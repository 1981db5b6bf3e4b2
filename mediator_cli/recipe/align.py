"""How experts' hidden units are put in the order of a model that they are compared with."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mediator_cli.recipe.strict import Strict

AlignGroup = Literal["mlp", "heads", "residual"]


class AlignSpec(Strict):
    """Before all else, permute the hidden units of full checkpoints so that they match those of one model."""

    method: Annotated[
        Literal["git_rebasin"],
        Field(description="git_rebasin: the order with the largest inner product of the weights (weight matching)."),
    ] = "git_rebasin"
    to: Annotated[
        str,
        Field(
            pattern=r"^(base|expert:.+)$",
            description="base or expert:NAME: whose order the others get. With an expert the base gets it too, and "
            "adapters with the base.",
        ),
    ] = "base"
    groups: Annotated[
        tuple[AlignGroup, ...],
        Field(
            strict=False,
            min_length=1,
            description="mlp: hidden units of feed-forward blocks. heads: attention heads, inside their group of key "
            "and value. residual: the stream between the layers, in one order for the whole model.",
        ),
    ] = ("mlp", "heads")
    max_passes: Annotated[
        int, Field(ge=1, description="Rounds over all groups, at most; more than one is needed for `residual` alone.")
    ] = 100
    seed: Annotated[
        int | None, Field(ge=0, lt=2**63, description="Seed of the order of the groups; default: the recipe's.")
    ] = None
