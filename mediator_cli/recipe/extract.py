"""The part of a recipe that says what experts keep."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mediator_cli.recipe.modes import Directions, ExtractMode, MaskLambda, ScaleOver, mode_faults
from mediator_cli.recipe.strict import Fraction, Strict

ValueCodec = Literal["fp32", "bf16", "fp16", "int8", "sign"]


Rescale = Annotated[
    bool | Annotated[float, Field(gt=0, allow_inf_nan=False)] | None,
    Field(
        description="Multiply kept values by this number, to make up for what is not kept; true = 1 / density, "
        "false = 1. Default: 1 / density when selected at random, else density ** -0.4, which measured best."
    ),
]


class ExtractSpec(Strict):
    """How the experts of routed units are stored: one dense expert, and what each adds to it."""

    mode: Annotated[
        ExtractMode,
        Field(
            description="sparse: a share of the entries of each delta. sign: one bit an entry and a scale (BitDelta). "
            "emr: one elected task vector, and for each expert a bit an entry and a scale (EMR-Merging). "
            "tall_mask: the sum of all deltas, and for each expert a bit an entry (TALL-masks). "
            "basis: the mean delta and a few directions, and for each expert some numbers. "
            "factors: LoRA adapters as the two small matrices that they are, exactly; implies `dense: base`."
        ),
    ] = "sparse"
    dense: Annotated[
        Literal["average", "base"], Field(description="The dense expert: the merged tensor or the base's.")
    ] = "average"
    density: Annotated[Fraction, Field(description="Share of the entries that are kept.")] = 0.05
    over: Annotated[
        Literal["tensor", "model"],
        Field(
            description="tensor: keep this share of each tensor. model: keep the largest entries of each expert over "
            "all its routed tensors, so that some tensors keep more and some none; tensors whose density or select "
            "an override sets are ranked alone."
        ),
    ] = "tensor"
    select: Annotated[Literal["magnitude", "random"], Field(description="Which entries are kept.")] = "magnitude"
    rescale: Rescale = None
    values: Annotated[
        ValueCodec,
        Field(
            description="How kept values, or arrays that experts share, are stored; arrays as bf16 where none is given."
        ),
    ] = "sign"
    scale: ScaleOver | None = None
    mask_lambda: MaskLambda | None = None
    directions: Directions | None = None

    @model_validator(mode="before")
    @classmethod
    def _factors_are_on_the_base(cls, data: Any) -> Any:  # noqa: ANN401 - pydantic hands over whatever the file holds
        # What adapters are added to is the base, so a recipe need not say so.
        return {"dense": "base", **data} if isinstance(data, dict) and data.get("mode") == "factors" else data

    @model_validator(mode="after")
    def _fields_fit_mode(self) -> ExtractSpec:
        given = {name for name in self.model_fields_set if getattr(self, name) is not None}
        if faults := list(mode_faults(self.mode, self.dense, given, self.written_values)):
            raise ValueError("; ".join(faults))
        return self

    @property
    def written_values(self) -> ValueCodec | None:
        """How values are stored if the recipe says it; None where its default would stand for another mode."""
        return self.values if "values" in self.model_fields_set else None

    @model_validator(mode="after")
    def _ranks_what_is_ranked(self) -> ExtractSpec:
        if self.over == "model" and self.select == "random":
            raise ValueError("`select: random` ranks nothing, so it takes no `over: model`")
        return self


class OverrideExtract(Strict):
    """The extract fields that an override may set; density and select also end `over: model` for its tensors."""

    mode: ExtractMode | None = None
    density: Fraction | None = None
    select: Literal["magnitude", "random"] | None = None
    rescale: Rescale = None
    values: ValueCodec | None = None
    scale: ScaleOver | None = None
    mask_lambda: MaskLambda | None = None
    directions: Directions | None = None
