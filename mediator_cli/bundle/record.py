"""What records of a bundle have in common, and those of single files."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Record(BaseModel):
    """A frozen schema that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class FileRecord(Record):
    """A file, its size in bytes and its SHA-256."""

    name: Annotated[str, Field(description="Path relative to its folder, with forward slashes.")]
    bytes: Annotated[int, Field(ge=0)]
    sha256: str


class WeightFile(Record):
    """A file of weights, its size in bytes and its digest: XXH3-128 over its header and tensors; see README.md."""

    name: Annotated[str, Field(description="Path relative to its folder, with forward slashes.")]
    bytes: Annotated[int, Field(ge=0)]
    xxh3: str


class SourceFile(Record):
    """A weight file of a source: SHA-256 where the Hub says it, the digest of a weight file where all was read."""

    name: Annotated[str, Field(description="Path relative to its folder, with forward slashes.")]
    bytes: Annotated[int, Field(ge=0)]
    sha256: str | None = None
    xxh3: str | None = None

    @property
    def digest(self) -> str:
        """The digest that is known; SHA-256 if both are."""
        return self.sha256 or self.xxh3 or ""
