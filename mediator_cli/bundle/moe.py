"""What the manifest says of a Mixture of Experts."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mediator_cli.bundle.record import Record


class GatesRecord(Record):
    """How the gates were made."""

    method: str
    temperature: float
    n_prompts: Annotated[int, Field(description="How many prompts were read.")]
    held_out: Annotated[bool, Field(description="Whether agreement was measured on prompts that made no gates.")]
    agreement: Annotated[
        dict[str, float],
        Field(description="By layer: share of tokens whose first choice is their prompt's expert; may be empty."),
    ]


class MoeRecord(Record):
    """The experts that stock software finds in this folder, and how its gates were made."""

    format: str
    experts: Annotated[tuple[str, ...], Field(description="Names, in the order of the gates' rows.")]
    experts_per_token: Annotated[int, Field(ge=1)]
    layers: Annotated[tuple[int, ...], Field(description="Layers that have experts; other blocks are merged.")]
    inner: Annotated[int, Field(description="Neurons of an expert.")]
    shared_from: Annotated[str, Field(description="average, or the source that all that is shared was copied from.")]
    n_parameters: int
    n_active: Annotated[int, Field(description="Parameters that one token passes through.")]
    gates: GatesRecord
