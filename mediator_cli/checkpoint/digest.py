"""SHA-256 of whole files, by the standard library alone."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from mediator_cli.checkpoint.header import CHECK_DISK, unreadable

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CHUNK = 1 << 20
"""Bytes that are digested at a time."""


def digest_file(file: Path, advance: Callable[[int], None] = lambda n: None) -> str:
    """Digest a whole file, telling `advance` of the bytes read; raise CheckpointError when it cannot be read."""
    digest = hashlib.sha256()
    try:
        with file.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                digest.update(chunk)
                advance(len(chunk))
    except OSError as error:
        raise unreadable(file, error, CHECK_DISK) from None
    return digest.hexdigest()
