"""A weight file at a URL, open for reading: ranges by way of a common read-ahead."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mediator_cli.checkpoint.remote.ahead import Ahead

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from mediator_cli.checkpoint.remote.folder import RemoteFile

_AT_A_TIME = 8


@dataclass(frozen=True)
class RemoteHandle:
    """Reads one file; any thread may."""

    ahead: Ahead
    number: int

    def read_into(self, offset: int, view: memoryview, span: tuple[int, int]) -> int:
        """Fill a view with the bytes from `offset`; gives how many came. `span` is that of the tensor."""
        return self.ahead.read_into(self.number, offset, view, span)


@contextmanager
def open_remote(files: Mapping[Path, RemoteFile]) -> Iterator[dict[Path, RemoteHandle]]:
    """Open weight files at URLs; raise CheckpointError where one was changed, before the first read or meanwhile."""
    _check(files.values())
    with Ahead() as ahead:
        yield {path: RemoteHandle(ahead, ahead.add(file.facts.size, file.read)) for path, file in files.items()}
    _check(files.values())


def _check(files: Iterable[RemoteFile]) -> None:
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        list(pool.map(lambda file: file.check(), files))
