"""Read files, digest them by xxh3, write a digested and synced copy of the first: copy_all.py OUTPUT|- FILE..."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

if TYPE_CHECKING:
    from collections.abc import Iterator

PIECE = 1 << 17
"""Bytes at a time, as `cat` reads; few enough for the processor's cache."""


def main() -> None:
    """Digest all files, then copy the first unless the output is `-`."""
    output, files = sys.argv[1], [Path(file) for file in sys.argv[2:]]
    for file in files:
        for _ in digested(file):
            pass
    if output != "-":
        copy(files[0], Path(output))


def digested(file: Path) -> Iterator[memoryview]:
    """Give a file's bytes piece by piece, each digested before."""
    digest, piece = xxhash.xxh3_128(), memoryview(bytearray(PIECE))
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(piece):
            digest.update(piece[:count])
            yield piece[:count]


def copy(file: Path, output: Path) -> None:
    """Write a copy that is digested and on disk at the end."""
    with output.open("wb", buffering=0) as stream:
        for piece in digested(file):
            stream.write(piece)
        os.fsync(stream.fileno())


if __name__ == "__main__":
    main()
