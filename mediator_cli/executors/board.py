"""A shared folder in which each process of a team keeps one record about itself that all others read.

Records are rewritten in place and read by opening: on NFS that shows what another machine wrote last, where a listing,
or a look for a file that is not there yet, may be half a minute late.
"""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from mediator_cli.checkpoint.write import write_error

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Record:
    """What a process tells of itself.

    `token` is new with each start, `session` the token of the first process that this one follows, "" before that.
    `beat` grows as long as the process lives; `shared` counts what was given to the others. `ended` is None while
    it works, "" if it ended well, and else what went wrong. The first process lists the tokens of the `members` that
    it knows, says that its journal `stands`, and then that all have `gathered`.
    """

    rank: int
    token: str
    run: str
    world: int
    session: str = ""
    beat: int = 0
    shared: int = 0
    ended: str | None = None
    members: tuple[str, ...] = ()
    stands: bool = False
    gathered: bool = False


@dataclass(frozen=True)
class Board:
    """The folder of the records."""

    folder: Path

    def post(self, record: Record) -> None:
        """Write a record over the one before; raise OutputError when that fails."""
        text = json.dumps(asdict(record)).encode()
        data = b"%08x%08x" % (len(text), zlib.crc32(text)) + text
        file = self._file(record.rank)
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                os.pwrite(descriptor, data, 0)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise write_error(file, error) from None

    def read(self, rank: int) -> Record | None:
        """Read a record; None where there is none, or none that is whole just now."""
        try:
            # Creating it asks the server; a plain look may be answered from what was not there a moment ago.
            descriptor = os.open(self._file(rank), os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
            with os.fdopen(descriptor, "rb") as stream:
                data = stream.read()
            text = data[16 : 16 + int(data[:8], 16)]
            if zlib.crc32(text) != int(data[8:16], 16):
                return None
            facts = json.loads(text)
            return Record(**{**facts, "members": tuple(facts["members"])})
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def clear(self, world: int) -> None:
        """Remove what an earlier start left, but the records of processes, which may have begun already."""
        keep = {self._file(rank) for rank in range(world)}
        for file in self.folder.iterdir():
            if file not in keep:
                file.unlink(missing_ok=True)

    def _file(self, rank: int) -> Path:
        return self.folder / f"process-{rank:05d}"
