"""Rows of the shared embedding and head, some at a time, from the rows of the experts that know each token."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from mediator_cli.checkpoint.read import read_slab, widen
from mediator_cli.engine.streams import Piece, not_finite

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from mediator_cli.checkpoint.header import TensorInfo
    from mediator_cli.checkpoint.read import Handle
    from mediator_cli.kernels.arrays import Floats
    from mediator_cli.pipeline.heterogeneous.model import PlannedExpert

_STEP = 4096
"""Rows that are read at a time where all are needed."""


@dataclass(frozen=True)
class Table:
    """One expert's rows of one kind: a matrix [rows, width] or a bias [rows], each row times `factor`.

    Without `info` all rows are zeros.
    """

    expert: PlannedExpert
    handles: Mapping[Path, Handle]
    info: TensorInfo | None
    factor: float

    @property
    def width(self) -> int:
        """Numbers in a row."""
        return self.info.shape[1] if self.info is not None and len(self.info.shape) == 2 else 1

    def read(self, rows: NDArray[np.int64]) -> Floats:
        """Read rows [n] as float32 [n, width]; raise CheckpointError where one holds NaN or infinity."""
        found = np.zeros((len(rows), self.width), np.float32)
        if self.info is None:
            return found
        for first, last in _runs(rows):
            self._read_run(int(rows[first]), found[first:last])
        return found * np.float32(self.factor)

    def _read_run(self, row: int, out: Floats) -> None:
        if self.info is None:
            return
        start, flat = row * self.width, out.reshape(-1)
        stored = read_slab(self.handles, self.info, start, start + flat.size)
        if not widen(stored, self.info.dtype, flat):
            raise not_finite(flat, f"expert {self.expert.name}", Piece(self.info.name, start, start + flat.size))

    @cached_property
    def mean(self) -> Floats:
        """The mean of all rows that stand for tokens of the output [width]."""
        known = np.unique(self.expert.rows[self.expert.rows >= 0])
        total = np.zeros(self.width, np.float64)
        for first in range(0, len(known), _STEP):
            total += self.read(known[first : first + _STEP]).sum(axis=0, dtype=np.float64)
        return (total / max(1, len(known))).astype(np.float32)


def _runs(rows: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Give the spans of an array of row numbers in which each is one more than the last."""
    cuts = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)] if len(rows) else []
    yield from pairwise(cuts)


def averaged(tables: Sequence[Table], first: int, last: int, width: int) -> Floats:
    """Average rows `first` to `last` of the output [n, width] over the experts that know each token.

    Narrower rows are padded with zeros behind them.
    """
    total = np.zeros((last - first, width), np.float64)
    count = np.zeros((last - first, 1), np.float64)
    for table in tables:
        rows = table.expert.rows[first:last]
        known = np.flatnonzero(rows >= 0)
        total[known, : table.width] += table.read(rows[known])
        count[known] += 1
    return (total / np.maximum(count, 1)).astype(np.float32)


def side_by_side(tables: Sequence[Table], first: int, last: int, width: int) -> Floats:
    """Put rows `first` to `last` of all experts beside each other [n, width].

    A token that an expert lacks has the mean of the expert's rows.
    """
    found = np.zeros((last - first, width), np.float32)
    for table in tables:
        rows = table.expert.rows[first:last]
        known = np.flatnonzero(rows >= 0)
        part = found[:, table.expert.start : table.expert.start + table.width]
        part[:] = table.mean
        part[known] = table.read(rows[known])
    return found
