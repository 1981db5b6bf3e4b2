"""Layers of several models stacked to a new depth, as a recipe says it: form only."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from mediator_cli.recipe.average import AverageSpec
from mediator_cli.recipe.layers import Graded, Layers
from mediator_cli.recipe.strict import Strict

WITH_SLICES, AVERAGE = "slices", "average"
"""What `outside` may say besides a source: as the nearest slice, or all experts merged."""


class SliceSource(Strict):
    """Layers of one source, in the order in which they are stacked."""

    source: Annotated[str, Field(min_length=1, description="`base`, or the name of an expert.")]
    layers: Annotated[Layers, Field(description="Its layers: 3, 0-10 (both ends), or a list; any order, also twice.")]
    weight: Annotated[
        Graded | None,
        Field(description="Merge coefficient here; default: the expert's. A list has anchors over the slice."),
    ] = None


class SliceOverride(Strict):
    """Other settings for some tensors of a slice; later ones win."""

    match: Annotated[str, Field(min_length=1, description="Glob on names of output tensors; default all.")] = "*"
    average: Annotated[
        AverageSpec | None,
        Field(description="A method with its parameters, or parameters alone: the method that applies then stays."),
    ] = None
    weights: Annotated[
        dict[str, Graded] | None, Field(min_length=1, description="Merge coefficients of some sources, by name.")
    ] = None
    optional: Annotated[bool, Field(description="Whether it may match nothing.")] = False

    @model_validator(mode="after")
    def _sets_something(self) -> SliceOverride:
        if self.average is None and self.weights is None:
            raise ValueError("an override needs average or weights")
        if self.average is not None:
            self.average.check_change()
        return self


class SliceSpec(Strict):
    """Layers of the output: those of one source, or of several merged one by one; `{source, layers}` alone copies."""

    sources: Annotated[tuple[SliceSource, ...], Field(strict=False, min_length=1, description="What is merged.")]
    base: Annotated[
        Layers | None,
        Field(description="The base's layers that deltas are taken from; default: the first source's numbers."),
    ] = None
    average: Annotated[
        AverageSpec | None,
        Field(description="Method of this slice, or parameters alone. Default: a single source is copied, several are "
              "merged as the recipe's `average` says."),
    ] = None  # fmt: skip
    overrides: Annotated[
        tuple[SliceOverride, ...], Field(strict=False, description="Other settings for some tensors of this slice.")
    ] = ()

    @model_validator(mode="before")
    @classmethod
    def _one_source(cls, data: Any) -> Any:  # noqa: ANN401 - pydantic hands over whatever the file holds
        if not isinstance(data, dict) or "sources" in data or "source" not in data:
            return data
        own = {key: value for key, value in data.items() if key in SliceSource.model_fields}
        return {"sources": [own], **{key: value for key, value in data.items() if key not in own}}

    @model_validator(mode="after")
    def _as_many_layers(self) -> SliceSpec:
        counts = {len(source.layers) for source in self.sources}
        if len(counts) > 1:
            each = ", ".join(f"{source.source} {len(source.layers)}" for source in self.sources)
            raise ValueError(f"all sources of a slice need as many layers: {each}")
        if self.base is not None and len(self.base) not in counts:
            raise ValueError(f"base has {len(self.base)} layers, the sources have {counts.pop()}")
        if self.average is not None:
            self.average.check_change()
        return self

    @property
    def length(self) -> int:
        """How many layers of the output it makes."""
        return len(self.sources[0].layers)
