"""What the manifest says of gates, which choose low-rank experts inside the model. Neither torch nor numpy here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, FiniteFloat

from mediator_cli.bundle.record import FileRecord, Record

GATES = "gates.safetensors"


class GateRule(Record):
    """How gates make weights of experts from a hidden state h: which score, of what, and what becomes of it."""

    score: Annotated[
        Literal["linear", "absolute", "length"],
        Field(description="linear: v·h + bias. absolute: |v·h|. length: |V·h| of several directions V."),
    ] = "linear"
    reads: Annotated[
        Literal["input", "unit", "normalised"],
        Field(
            description="h as it is, scaled to length 1, or with mean 0 and variance 1 (layer norm without weights)."
        ),
    ] = "input"
    at: Annotated[
        Literal["module", "layer"],
        Field(
            description="Whether each matrix has a gate that reads its input, or each decoder layer, or a part of it "
            "such as its MLP, one for all its matrices."
        ),
    ] = "module"
    per: Annotated[
        Literal["token", "sequence"],
        Field(
            description="sequence: one choice, from the mean of h over the prompt, for all tokens of the answer too."
        ),
    ] = "token"
    temperature: Annotated[FiniteFloat, Field(gt=0, description="Divides the scores.")] = 1.0
    top_k: Annotated[int | None, Field(ge=1, description="Only so many experts of the highest scores; null: all.")] = (
        None
    )
    weights: Annotated[
        Literal["softmax", "free", "sigmoid"],
        Field(description="Softmax of the scores that are left, the scores themselves, or the sigmoid of each."),
    ] = "softmax"


class GatesRecord(Record):
    """The gates of a bundle: what made them, how they choose, among which experts, and their file."""

    method: str
    rule: GateRule
    experts: Annotated[tuple[str, ...], Field(min_length=1, description="In the order of the gates' outputs.")]
    file: FileRecord
