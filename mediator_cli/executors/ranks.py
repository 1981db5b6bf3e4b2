"""A team of processes that run the same command and meet in a shared folder, with nothing but files between them.

Process 0 begins the journal and ends the merge; all others join it. All have to run at the same time.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from mediator_cli.errors import MediatorError, OutputError, Problem, first_line, some_names
from mediator_cli.executors.board import Board
from mediator_cli.executors.exchange import add_arrays, load_arrays, owner_of, save_arrays
from mediator_cli.executors.place import PATIENCE
from mediator_cli.executors.watch import Watch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from mediator_cli.engine.journal import Journal
    from mediator_cli.engine.streams import Piece
    from mediator_cli.engine.team import Arrays
    from mediator_cli.executors.place import Place

T = TypeVar("T")
_SHORTEST, _LONGEST = 0.005, 0.5
"""Seconds between two looks for what is waited for."""
_FAREWELL = 30.0
"""Seconds that the first process, when it failed, gives the others to notice."""


@dataclass
class Ranks:
    """One process among those of a place; `owners` says by tensor who looks at it in a survey."""

    place: Place
    owners: Mapping[str, int]
    patience: float = PATIENCE
    pulse: float = 2.0
    _watch: Watch | None = field(default=None, init=False)
    _steps: int = field(default=0, init=False)

    @property
    def member(self) -> int:
        """The number of this process."""
        return self.place.rank

    @property
    def is_first(self) -> bool:
        """Whether this is process 0."""
        return self.place.rank == 0

    def meet(self, board: Path) -> None:
        """Post a record in the shared folder; wait, but for the first, until the first knows it."""
        board.mkdir(exist_ok=True)
        if self.is_first:
            Board(board).clear(self.place.world)
        self._watch = Watch(Board(board), self.place, self.patience, self.pulse)
        self._watch.start()
        if not self.is_first:
            token = self._until(self._accepted, self._not_begun, limit=self.patience)
            self._watch.post(session=token)
            self._check_world()

    def gather(self) -> None:
        """Wait until all processes know the journal as it is now."""
        watch = self._at_work()
        if self.is_first:
            watch.post(stands=True)
            tokens = self._until(self._all_here, self._absent, limit=self.patience)
            watch.post(gathered=True, members=tokens)
        else:
            watch.post(shared=0, gathered=True)
            self._until(lambda: _true((first := watch.read(0)) and first.gathered), lambda: "not all processes came")

    def leave(self, error: BaseException | None) -> None:
        """Tell how this process ended; the first goes last, so that nobody still reads what it then clears away."""
        if (watch := self._watch) is None:
            return
        self._watch = None
        try:
            text = "" if error is None else watch.trouble or f"process {self.member} failed: {_told(error)}"
            watch.post(ended=text)
            if self.is_first:
                self._see_off(watch, self.patience if error is None else min(self.patience, _FAREWELL))
        except OutputError:
            # The folder went with the first process: nobody is left to be told.
            return
        finally:
            watch.stop()

    def mine(self, parts: Sequence[Piece]) -> Sequence[Piece]:
        """Choose the pieces of this process's tensors."""
        world = self.place.world
        return [piece for piece in parts if owner_of(piece.tensor, self.owners, world) == self.member]

    def share(self, arrays: list[Arrays]) -> list[Arrays]:
        """Add up the arrays of all processes, in the order of their numbers."""
        if self.place.world == 1:
            return arrays
        self._steps += 1
        return self._collect(arrays) if self.is_first else self._contribute(arrays)

    def has_shard(self, number: int, count: int) -> bool:
        """Deal the shards out in turn."""
        return number % self.place.world == self.member

    def wait_for(self, journal: Journal, steps: Sequence[str]) -> None:
        """Read the journals until they have all steps; the first waits, too, until all others have come to here.

        For only then have they closed the files that these steps filled.
        """
        watch = self._at_work()
        self._steps += 1
        watch.post(shared=self._steps)
        others = range(1, self.place.world) if self.is_first else ()

        def read() -> bool | None:
            journal.read_members(range(self.place.world))
            done = all(step in journal.steps for step in steps)
            return _true(done and all(self._gave(rank, self._steps) for rank in others))

        def missing() -> str:
            left = [step for step in steps if step not in journal.steps]
            return f"not finished: {some_names(left)}" if left else "all steps are finished"

        self._until(read, missing)

    def check(self) -> None:
        """Raise OutputError if another process failed or vanished."""
        watch = self._at_work()
        if watch.trouble:
            raise self._error(watch.trouble)

    def _collect(self, arrays: list[Arrays]) -> list[Arrays]:
        watch, step = self._at_work(), self._steps
        totals: list[Arrays] = [[np.array(array) for array in group] for group in arrays]
        for rank in range(1, self.place.world):
            self._until(lambda rank=rank: self._gave(rank, step), lambda rank=rank: f"process {rank} counts still")  # type: ignore[misc]
            file = self._file(step, rank)
            add_arrays(totals, load_arrays(file, totals))
            file.unlink()
        save_arrays(self._file(step, 0), totals)
        # All have come to this step, so all have read the one before.
        self._file(step - 1, 0).unlink(missing_ok=True)
        watch.post(shared=step)
        return totals

    def _contribute(self, arrays: list[Arrays]) -> list[Arrays]:
        watch, step = self._at_work(), self._steps
        save_arrays(self._file(step, self.member), arrays)
        watch.post(shared=step)
        self._until(lambda: self._gave(0, step), lambda: "process 0 adds up still")
        return load_arrays(self._file(step, 0), arrays)

    def _gave(self, rank: int, step: int) -> bool | None:
        record = self._at_work().read(rank)
        return _true(record is not None and record.session == self._session and record.shared >= step)

    @property
    def _session(self) -> str:
        return self._at_work().own.session

    def _file(self, step: int, rank: int) -> Path:
        return self._at_work().board.folder / f"counts-{self._session}-{step:06d}-{rank:05d}.npz"

    def _accepted(self) -> str | None:
        watch = self._at_work()
        first = watch.read(0)
        known = first is not None and first.stands and first.members[self.member : self.member + 1]
        return first.token if first is not None and known == (watch.own.token,) else None

    def _check_world(self) -> None:
        first = self._at_work().read(0)
        if first is not None and first.world != self.place.world:
            raise self._error(f"process 0 counts {first.world} processes, this one {self.place.world}")

    def _not_begun(self) -> str:
        return f"process 0 of the run '{self.place.run}' has not come"

    def _all_here(self) -> tuple[str, ...] | None:
        """Give the tokens of all processes once they have read the journal; the record lists those that are known."""
        watch = self._at_work()
        records = [watch.read(rank) for rank in range(1, self.place.world)]
        tokens = (watch.own.token, *(record.token if record else "" for record in records))
        if tokens != watch.own.members:
            watch.post(members=tokens)
        joined = [record for record in records if record and record.session == watch.own.token and record.gathered]
        return tokens if len(joined) == len(records) else None

    def _absent(self) -> str:
        watch = self._at_work()
        records = {rank: watch.read(rank) for rank in range(1, self.place.world)}
        absent = [str(rank) for rank, record in records.items() if not record or record.session != watch.own.token]
        return f"of {self.place.world} processes did not come: {some_names(absent, 10)}"

    def _see_off(self, watch: Watch, limit: float) -> None:
        """Wait until all that came have ended, or are silent."""
        end, pause = time.monotonic() + limit, _SHORTEST
        while time.monotonic() < end and any(self._is_here(watch, rank) for rank in range(1, self.place.world)):
            time.sleep(pause)
            pause = min(_LONGEST, 1.5 * pause)

    def _is_here(self, watch: Watch, rank: int) -> bool:
        record = watch.read(rank)
        came = record is not None and (record.session == watch.own.token or watch.lives(rank))
        return came and record is not None and record.ended is None and not watch.is_silent(rank)

    def _until(self, ready: Callable[[], T | None], missing: Callable[[], str], limit: float | None = None) -> T:
        """Look again and again until something is there; raise OutputError when the team has broken up."""
        end, pause = time.monotonic() + (limit or float("inf")), _SHORTEST
        while (found := ready()) is None:
            trouble = self._at_work().trouble
            if trouble:
                raise self._error(f"{trouble}; {missing()}")
            if time.monotonic() > end:
                raise self._error(f"{missing()}; waited {limit:.0f} s")
            time.sleep(pause)
            pause = min(_LONGEST, 1.5 * pause)
        return found

    def _error(self, message: str) -> OutputError:
        hint = "mend that, then start all processes again, at the same time, with --resume"
        return OutputError(Problem(f"process {self.member} of {self.place.world}", message, hint))

    def _at_work(self) -> Watch:
        if self._watch is None:
            raise RuntimeError("the team has not met")
        return self._watch


def _true(condition: object) -> bool | None:
    return True if condition else None


def _told(error: BaseException) -> str:
    if isinstance(error, MediatorError):
        return "; ".join(f"{p.place}: {p.message}" if p.place else p.message for p in error.problems)
    if isinstance(error, KeyboardInterrupt | SystemExit):
        return "it was interrupted"
    return f"{type(error).__name__}: {first_line(error)}" if isinstance(error, Exception) else type(error).__name__
