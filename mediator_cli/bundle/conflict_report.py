"""The conflict report: how much experts disagree, unit by unit and tensor by tensor; reusable by a later merge."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mediator_cli.bundle.manifest import UnitScores
from mediator_cli.bundle.record import Record, SourceFile


class TensorConflict(Record):
    """The counts of one tensor; tables [n, n] in the order of experts, `gram` before denoising."""

    size: int
    opposite: tuple[tuple[int, ...], ...]
    both: tuple[tuple[int, ...], ...]
    support: tuple[int, ...]
    any_opposite: int
    shared: int
    gram: tuple[tuple[float, ...], ...]


class ConflictSample(Record):
    """Of an estimate: the share of each tensor's blocks that was read, and how far each score may be off."""

    share: Annotated[float, Field(gt=0, lt=1)]
    bounds: Annotated[dict[str, UnitScores], Field(description="By unit: in 95 of 100 samples the error is smaller.")]


class ConflictReport(Record):
    """The full conflict report: scores by unit, counts by tensor, and the sources they belong to."""

    schema_version: Literal[2]
    experts: tuple[str, ...]
    sources: dict[str, tuple[SourceFile, ...]]
    denoise: str
    align: Annotated[str, Field(description="How hidden units were put in one order first.")] = "none"
    unit: str
    units: dict[str, UnitScores]
    tensors: dict[str, TensorConflict]
    sample: Annotated[
        ConflictSample | None, Field(description="Null where all was read; otherwise scores and counts are estimates.")
    ] = None
