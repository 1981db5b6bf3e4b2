"""What a recipe says of single tokens."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from mediator_cli.recipe.strict import Strict

ZERO = "zero"
"""A row of zeros, where a source of rows is named."""


class TokenSpec(Strict):
    """Where the rows of one token come from; a token that the tokenizer lacks is added to it."""

    source: Annotated[
        str | None,
        Field(description="base, an expert, or zero. Default: the base, else the mean of the experts that have it."),
    ] = None
    token: Annotated[
        str | None, Field(min_length=1, description="Another token of the source, whose row is taken.")
    ] = None
    id: Annotated[int | None, Field(ge=0, description="The number of the source's row, instead of a token.")] = None
    force: Annotated[
        bool, Field(description="Whether sources that have the token take this row too, not only those that lack it.")
    ] = False

    @model_validator(mode="after")
    def _one_row(self) -> TokenSpec:
        if self.token is not None and self.id is not None:
            raise ValueError("give token or id, not both")
        if (self.token is not None or self.id is not None) and self.source in (None, ZERO):
            raise ValueError("token and id name a row of a source; give base or an expert as source")
        return self
