"""Arrays that travel between processes through files, and which process looks at which tensor."""

from __future__ import annotations

import heapq
import os
import zlib
from typing import TYPE_CHECKING
from zipfile import BadZipFile

import numpy as np

from mediator_cli.checkpoint.write import sync, write_error
from mediator_cli.errors import OutputError, Problem

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from mediator_cli.engine.team import Arrays


def save_arrays(file: Path, groups: Sequence[Arrays]) -> None:
    """Write groups of arrays to a file that appears whole; raise OutputError when that fails."""
    staged = file.with_name(f".{file.name}.new")
    arrays = {f"{at}.{n}": array for at, group in enumerate(groups) for n, array in enumerate(group)}
    try:
        with staged.open("wb") as stream:
            np.savez(stream, allow_pickle=False, **arrays)
            stream.flush()
            os.fsync(stream.fileno())
        staged.rename(file)
        sync(file.parent)
    except OSError as error:
        raise write_error(file, error) from None


def load_arrays(file: Path, like: Sequence[Arrays]) -> list[Arrays]:
    """Read groups of arrays that are like those given in number, shape and dtype; raise OutputError if they are not."""
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            found = [[stored[f"{at}.{n}"] for n in range(len(group))] for at, group in enumerate(like)]
            is_same = len(stored.files) == sum(map(len, like)) and all(map(_alike, found, like))
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise _unusable(file, str(error)) from None
    if not is_same:
        raise _unusable(file, "it holds other arrays than expected")
    return list(found)


def _alike(group: Arrays, other: Arrays) -> bool:
    return all(a.shape == b.shape and a.dtype == b.dtype for a, b in zip(group, other, strict=True))


def _unusable(file: Path, reason: str) -> OutputError:
    message = f"cannot use what another process counted: {reason}"
    return OutputError(Problem(str(file), message, "start all processes again with --resume"))


def add_arrays(totals: Sequence[Arrays], more: Sequence[Arrays]) -> None:
    """Add arrays to totals, in place."""
    for group, others in zip(totals, more, strict=True):
        for total, other in zip(group, others, strict=True):
            total += other


def share_out(sizes: Mapping[str, int], world: int) -> dict[str, int]:
    """Give each tensor to one of `world` processes so that all have about as many elements.

    >>> share_out({"a": 4, "b": 3, "c": 2, "d": 1}, 2)
    {'a': 0, 'b': 1, 'c': 1, 'd': 0}
    """
    loads = [(0, rank) for rank in range(world)]
    owners: dict[str, int] = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        load, rank = heapq.heappop(loads)
        owners[name] = rank
        heapq.heappush(loads, (load + sizes[name], rank))
    return owners


def owner_of(name: str, owners: Mapping[str, int], world: int) -> int:
    """Say whose a tensor is; those that were not shared out go by their name."""
    return owners[name] if name in owners else zlib.crc32(name.encode()) % world
