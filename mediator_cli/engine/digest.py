"""SHA-256 of files and of tensors' bytes, in parallel."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from mediator_cli.checkpoint.digest import CHUNK, digest_file
from mediator_cli.checkpoint.read import bytes_view, open_files, read_bytes
from mediator_cli.engine.pool import map_ordered

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from mediator_cli.checkpoint.header import TensorInfo


def digest_files(files: Sequence[Path], workers: int, advance: Callable[[int], None]) -> dict[Path, str]:
    """Digest files side by side."""
    unique = list(dict.fromkeys(files))
    return dict(zip(unique, map_ordered(lambda file: digest_file(file, advance), unique, workers), strict=True))


def digest_tensors(tensors: Mapping[str, TensorInfo], workers: int, advance: Callable[[int], None]) -> dict[str, str]:
    """Digest the bytes of each tensor as they lie on disk."""
    with open_files(info.file for info in tensors.values()) as descriptors:

        def one(info: TensorInfo) -> str:
            digest = hashlib.sha256()
            for start in range(0, info.n_bytes, CHUNK):
                chunk = read_bytes(descriptors, info, start, min(start + CHUNK, info.n_bytes))
                digest.update(bytes_view(chunk))
                advance(len(chunk))
            return digest.hexdigest()

        return dict(zip(tensors, map_ordered(one, list(tensors.values()), workers), strict=True))
