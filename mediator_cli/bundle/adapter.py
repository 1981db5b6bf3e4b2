"""What an adapter that was made here says of itself, beside PEFT's own config."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from mediator_cli.bundle.manifest import MethodRecord, RecipeRecord, SourceRecord
from mediator_cli.bundle.record import FileRecord, Record

ADAPTER_MANIFEST = "adapter_manifest.json"
SAFE_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks that servers make room for; vLLM takes no others, and pads every adapter to the largest."""


class ModuleRecord(Record):
    """One module of an adapter: its rank, and how much of a full change it holds where it was extracted."""

    rank: Annotated[int, Field(ge=0)]
    energy: Annotated[
        float | None, Field(description="1 - |delta - b·a|² / |delta|² of the change it was extracted from; else null.")
    ] = None


class AdapterManifest(Record):
    """How an adapter was made: from which sources, by what, with the digests of all that was written."""

    schema_version: Literal[1] = 1
    generator: str
    made_by: Literal["merge", "extract"]
    recipe: Annotated[RecipeRecord | None, Field(description="The recipe of a merge; null where one was extracted.")]
    settings: Annotated[dict[str, Any] | None, Field(description="The options of an extraction; else null.")] = None
    base: SourceRecord
    experts: tuple[SourceRecord, ...]
    methods: tuple[MethodRecord, ...] = ()
    seed: int
    dtype: str
    modules: dict[str, ModuleRecord]
    saved: Annotated[tuple[str, ...], Field(description="Tensors that are stored whole.")] = ()
    tensors: Annotated[dict[str, str], Field(description="Digest of each tensor; see README.md.")]
    files: tuple[FileRecord, ...]
    digest: Annotated[str, Field(description="Of the numbers: SHA-256 over lines `digest  name` of all tensors.")]
    notices: tuple[str, ...] = ()
