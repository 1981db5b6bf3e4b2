"""The ways to store an expert that a recipe may choose, and which fields of `extract` belong to each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

ExtractMode = Literal["sparse", "sign", "emr", "tall_mask", "basis", "factors"]

MODE_FIELDS: dict[str, tuple[str, ...]] = {
    "sparse": ("density", "over", "select", "rescale", "values"),
    "sign": (),
    "emr": ("scale", "values"),
    "tall_mask": ("mask_lambda", "values"),
    "basis": ("directions", "values"),
    "factors": (),
}
"""The fields of `extract` that each mode takes beside `dense`."""
ON_BASE = ("emr", "tall_mask", "factors")
"""Modes that are defined on the base's own values."""


def mode_faults(mode: str, dense: str, given: Iterable[str], values: str | None) -> Iterator[str]:
    """Say what does not go together in an `extract`: fields, dense expert, how values are stored."""
    if extra := sorted(set(given) - {"mode", "dense", *MODE_FIELDS[mode]}):
        fields = ", ".join(MODE_FIELDS[mode]) or "no field of its own"
        yield f"mode '{mode}' takes no {', '.join(extra)}; it takes {fields}"
    if mode in ON_BASE and dense != "base":
        yield f"mode '{mode}' adds to the base's own values; write `dense: base`"
    if mode != "sparse" and values in ("int8", "sign"):
        yield f"mode '{mode}' stores what experts share as fp32, bf16 or fp16, not as {values}"


Directions = Annotated[
    int,
    Field(
        ge=0,
        description="Mode basis: how many directions each tensor keeps beside the mean of the experts, below their "
        "number; each costs as much as an expert, and all but one of them give every expert back. Default 1.",
    ),
]
MaskLambda = Annotated[
    float,
    Field(
        ge=0,
        allow_inf_nan=False,
        description="Mode tall_mask: an entry is the expert's where |delta| > this * |sum of all deltas - delta|; "
        "larger keeps less. Default 0.4.",
    ),
]
ScaleOver = Annotated[
    Literal["elements", "tensors"],
    Field(
        description="Mode emr: an expert's scale is the ratio of summed magnitudes over all entries of its tensors "
        "(elements: the paper), or of the summed means of each tensor (tensors: the authors' main program). "
        "Default elements."
    ),
]
