"""The record of a router in a folder of its own, away from its bundle. Neither torch nor numpy here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from mediator_cli.bundle.manifest import read_record
from mediator_cli.bundle.record import FileRecord, Record
from mediator_cli.bundle.router_record import RouterRecord
from mediator_cli.errors import BundleError, Problem

if TYPE_CHECKING:
    from pathlib import Path

ROUTER_RECORD, ARRAYS, EMBEDDINGS = "router.json", "router.safetensors", "embeddings.safetensors"
TABLE = "embeddings"
"""The name of the one tensor in EMBEDDINGS."""


class TableRecord(Record):
    """Input embeddings of the dense expert [tokens, hidden], in their own dtype."""

    file: FileRecord
    dtype: str
    shape: tuple[int, int]


class RouterFolder(Record):
    """A router that decides without its bundle: what it is of, what it decides by, and its files."""

    format: Literal["mediator.router-folder"] = "mediator.router-folder"
    version: Literal[1] = 1
    generator: str
    bundle: Annotated[str, Field(description="Digest of the bundle that it was taken from.")]
    router: Annotated[RouterRecord, Field(description="As in the manifest of the bundle.")]
    embeddings: Annotated[TableRecord | None, Field(description="For features embedding_mean, else null.")] = None
    dense: Annotated[str, Field(description="Name under which a server has the dense expert.")] = "dense"
    models: Annotated[dict[str, str], Field(description="Names under which a server has the experts, by expert.")]
    files: Annotated[tuple[FileRecord, ...], Field(description="The tokenizer's files.")] = ()


def read_router_folder(folder: Path) -> RouterFolder:
    """Read the record of an exported router; raise BundleError when it is not one, or names experts it has not."""
    record = read_record(folder / ROUTER_RECORD, RouterFolder, "the record of a router")
    if set(record.models) != set(record.router.experts):
        place = f"{folder / ROUTER_RECORD} models"
        raise BundleError(Problem(place, "do not name every expert once", "export the router again"))
    return record
