"""A thread that tells the others that this process lives, and notices when one of them does not."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field, replace
from threading import Event, RLock, Thread
from typing import TYPE_CHECKING

from mediator_cli.errors import MediatorError
from mediator_cli.executors.board import Record

if TYPE_CHECKING:
    from typing import Any

    from mediator_cli.executors.board import Board
    from mediator_cli.executors.place import Place


@dataclass
class _Seen:
    """The last sign of life of a process, when it came, and whether a second one came from the same start."""

    token: str
    beat: int
    since: float
    lives: bool = False


@dataclass
class Watch:
    """The record of this process, kept up to date, and what is known of the others; for any thread."""

    board: Board
    place: Place
    patience: float
    pulse: float
    own: Record = field(init=False)
    trouble: str = ""
    _seen: dict[int, _Seen] = field(default_factory=dict)
    _stop: Event = field(default_factory=Event)
    _lock: RLock = field(default_factory=RLock)
    _thread: Thread = field(init=False)

    def __post_init__(self) -> None:
        self.own = Record(self.place.rank, secrets.token_hex(8), self.place.run, self.place.world)
        if self.place.rank == 0:
            self.own = replace(self.own, session=self.own.token)
        self._thread = Thread(target=self._beat, daemon=True, name="team")

    def start(self) -> None:
        """Post the first record and begin to watch."""
        self.post()
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join()

    def post(self, **changes: Any) -> None:  # noqa: ANN401 - fields of Record
        """Change this process's record and write it."""
        with self._lock:
            self.own = replace(self.own, beat=self.own.beat + 1, **changes)
            self.board.post(self.own)

    def read(self, rank: int) -> Record | None:
        """Read the record of another process of this start; None while there is none."""
        record = self.board.read(rank)
        if record is None or record.run != self.place.run:
            return None
        with self._lock:
            seen = self._seen.get(rank)
            if seen is None or seen.token != record.token:
                self._seen[rank] = _Seen(record.token, record.beat, time.monotonic())
            elif seen.beat != record.beat:
                seen.beat, seen.since, seen.lives = record.beat, time.monotonic(), True
        return record

    def lives(self, rank: int) -> bool:
        """Whether the process that wrote the record was seen to write it again."""
        return rank in self._seen and self._seen[rank].lives

    def is_silent(self, rank: int) -> bool:
        """Whether a process has given no sign of life for too long."""
        seen = self._seen.get(rank)
        return seen is not None and time.monotonic() - seen.since > self.patience

    def look(self) -> None:
        """Look at the others once, and note the first trouble."""
        trouble = self._look_at_members() if self.place.rank == 0 else self._look_at_first()
        mine = self.board.read(self.place.rank)
        if mine is not None and mine.token != self.own.token:
            trouble = f"another process is number {self.place.rank} too"
        elif not self.board.folder.is_dir():
            trouble = "process 0 has ended"
        self.trouble = self.trouble or trouble

    def _beat(self) -> None:
        while not self._stop.wait(self.pulse):
            try:
                self.look()
                if not self.trouble:
                    self.post()
            except MediatorError as error:
                self.trouble = self.trouble or str(error.problems[0].message)

    def _look_at_members(self) -> str:
        records = {rank: self.read(rank) for rank in range(1, self.place.world)}
        with self._lock:
            if not self.own.gathered:
                tokens = (record.token if record else "" for record in records.values())
                self.own = replace(self.own, members=(self.own.token, *tokens))
        return next(filter(None, (self._trouble_with(rank, record) for rank, record in records.items())), "")

    def _trouble_with(self, rank: int, record: Record | None) -> str:
        is_member = record is not None and record.session == self.own.token
        if record is not None and is_member and record.ended:
            return record.ended
        if record is not None and self.lives(rank) and record.world != self.place.world:
            return f"process {rank} counts {record.world} processes, process 0 counts {self.place.world}"
        if not self.own.gathered:
            return ""
        if record is not None and record.token != self.own.members[rank]:
            return f"process {rank} was started anew"
        if self.is_silent(rank) and not (record is not None and record.ended == ""):
            return f"process {rank} has given no sign of life for {self.patience:.0f} s"
        return ""

    def _look_at_first(self) -> str:
        record = self.read(0)
        if record is None:
            return ""
        if self.own.session and record.token != self.own.session:
            return "process 0 was started anew"
        if record.ended and (self.own.session or self.lives(0)):
            return record.ended
        if self.own.session and self.is_silent(0):
            return f"process 0 has given no sign of life for {self.patience:.0f} s"
        if self.lives(0) and record.world != self.place.world:
            return f"process 0 counts {record.world} processes, process {self.place.rank} counts {self.place.world}"
        return ""
