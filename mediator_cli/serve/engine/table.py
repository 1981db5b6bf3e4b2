"""The rows that are answered at present: those that write lie side by side, then those whose prompts are being read."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mediator_cli.errors import MediatorError, Problem, first_line
from mediator_cli.serve.engine.batch import Chunk
from mediator_cli.serve.engine.prefixes import Kept
from mediator_cli.serve.engine.request import Failed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from mediator_cli.serve.engine.batch import Batch
    from mediator_cli.serve.engine.prefixes import Prefixes
    from mediator_cli.serve.engine.row import Row

_LOG = logging.getLogger("mediator.serve")


@dataclass
class Counts:
    """What has been done since the start."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    answer_tokens: int = 0
    passes: int = 0


@dataclass
class Table:
    """Rows by their places in the batch; the first `n_writing` write, the others are read, `chunk` tokens in a pass."""

    batch: Batch
    prefixes: Prefixes
    chunk: int
    rows: list[Row] = field(default_factory=list)
    n_writing: int = 0
    counts: Counts = field(default_factory=Counts)

    @property
    def is_full(self) -> bool:
        """Whether there is no place for another row."""
        return len(self.rows) >= self.batch.most_rows

    def seat(self, row: Row) -> None:
        """Give a row the next place, and what is held of a prompt that begins like its own."""
        request = row.request
        found = None if request.echo else self.prefixes.find(row.weights, request.prompt)
        if found is not None:
            kept, row.n_cached = found
            row.n_read = row.n_cached
            self.batch.copy_in(len(self.rows), kept, row.n_cached)
            self.counts.cached_tokens += row.n_cached
        self.rows.append(row)

    def turn(self) -> None:
        """Read some of what is to be read, and write one token of each answer; finished rows leave."""
        self.leave_finished()
        self._guarded(self._read)
        self.leave_finished()
        self._guarded(self._write)
        self.leave_finished()

    def leave_finished(self) -> None:
        """Let rows that are finished, cancelled or failed leave."""
        for at in reversed(range(len(self.rows))):
            if self.rows[at].is_over:
                self._leave(at)

    def fail(self, failed: Failed) -> None:
        """End all rows, since what is held of them is not known any more."""
        for row in self.rows:
            row.fail(failed)
        self.rows.clear()
        self.n_writing = 0
        self.batch.clear()

    def _guarded(self, do: Callable[[], None]) -> None:
        """Do a pass; whatever goes wrong, callers are told and other requests are answered."""
        try:
            do()
        except MediatorError as error:
            self.fail(Failed(error.problems[0]))
        except Exception as error:  # noqa: BLE001 - the model may raise anything
            self.fail(
                Failed(Problem("", f"the model failed: {first_line(error)}", "see the server's log"), is_ours=True)
            )

    def _read(self) -> None:
        """Read the next chunk of prompts: several short ones padded to the longest, or a part of a long one."""
        first, some = self.n_writing, list(self._next_chunks())
        if not some:
            return
        logits = self.batch.run(first, some)
        self.counts.passes += 1
        for row, chunk, own in zip(self.rows[first:], some, logits, strict=False):
            self.counts.prompt_tokens += len(chunk.tokens)
            row.take_prompt(list(chunk.tokens), own)
            self.counts.answer_tokens += len(row.answer)
        for at in range(first, first + len(some)):
            if self.rows[at].is_read:
                self._promote(at)

    def _next_chunks(self) -> Iterator[Chunk]:
        longest = 0
        for n_rows, row in enumerate(self.rows[self.n_writing :], 1):
            stop = row.n_read + self.chunk if self.batch.can_split else None
            tokens = row.request.prompt[row.n_read : stop]
            longest = max(longest, len(tokens))
            if n_rows > 1 and longest * n_rows > self.chunk:
                return
            yield Chunk(tokens, row.n_read, row.weights, wants_all=row.request.echo)

    def _promote(self, at: int) -> None:
        """Put a row that is read behind those that write."""
        target = self.n_writing
        if at != target:
            self.batch.swap(at, target, max(self.rows[at].n_held, self.rows[target].n_held))
            self.rows[at], self.rows[target] = self.rows[target], self.rows[at]
        self.n_writing += 1

    def _write(self) -> None:
        """Choose one more token of each answer."""
        writing = self.rows[: self.n_writing]
        if not writing:
            return
        logits: list[torch.Tensor] = self.batch.run(
            0, [Chunk(row.answer[-1:], row.n_held, row.weights) for row in writing]
        )
        self.counts.passes += 1
        for row, own in zip(writing, logits, strict=True):
            row.take(own[-1])
        self.counts.answer_tokens += len(writing)

    def _leave(self, at: int) -> None:
        """Let a row leave; others take its place, so that rows stay side by side."""
        row, hole = self.rows[at], at
        if row.reason in ("stop", "length"):
            self._keep(at, row)
        if at < self.n_writing:
            self.n_writing -= 1
            self._fill(hole, self.n_writing)
            hole = self.n_writing
        self._fill(hole, len(self.rows) - 1)
        self.rows.pop()
        row.finish()

    def _fill(self, hole: int, source: int) -> None:
        if hole == source:
            return
        # A row that nothing was read of has no place in the batch yet.
        if n_held := self.rows[source].n_held:
            self.batch.move(source, hole, n_held)
        self.rows[hole] = self.rows[source]

    def _keep(self, at: int, row: Row) -> None:
        """Keep what was read and written, for prompts that go on from here."""
        tokens = (*row.request.prompt, *row.answer)[: row.n_held]
        if self.prefixes.wants(len(tokens)) and (arrays := self.batch.copy_out(at, len(tokens))):
            self.prefixes.keep(row.weights, Kept(tokens, arrays))
