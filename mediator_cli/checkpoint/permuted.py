"""Tensors whose rows and columns are read in another order."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from mediator_cli.kernels.floats import is_finite

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mediator_cli.checkpoint.read import Reader
    from mediator_cli.kernels.arrays import Counts, Floats


@dataclass(frozen=True)
class Axes:
    """The order of a matrix with rows of `length`: place i of an axis has what stands at index[i]; None is as it is.

    A vector is one row.
    """

    length: int
    rows: Counts | None = None
    columns: Counts | None = None


@dataclass(frozen=True)
class PermutedReader:
    """Reads tensors in the order that `axes` give by name, and all others as they are."""

    inner: Reader
    axes: Mapping[str, Axes]

    def read_into(self, name: str, start: int, stop: int, out: Floats) -> bool:
        """Fill `out` [stop - start] with one slab in float32; tell whether all entries are finite."""
        axes = self.axes.get(name)
        if axes is None or stop <= start:
            return self.inner.read_into(name, start, stop, out)
        first, last = start // axes.length, -(-stop // axes.length)
        rows = np.empty((last - first, axes.length), np.float32)
        is_whole = self._read_rows(name, axes, first, rows)
        ordered = rows if axes.columns is None else rows[:, axes.columns]
        offset = start - first * axes.length
        out[:] = ordered.reshape(-1)[offset : offset + len(out)]
        # What was read beside the slab is no part of it.
        return is_whole or is_finite(out)

    def _read_rows(self, name: str, axes: Axes, first: int, out: Floats) -> bool:
        """Read whole rows from place `first`, those that follow each other in one go."""
        places = np.arange(first, first + len(out))
        sources = places if axes.rows is None else axes.rows[first : first + len(out)]
        cuts = [0, *(np.flatnonzero(np.diff(sources) != 1) + 1).tolist(), len(out)]
        is_whole = True
        for begin, end in pairwise(cuts):
            at = int(sources[begin]) * axes.length
            flat = out[begin:end].reshape(-1)
            is_whole &= self.inner.read_into(name, at, at + len(flat), flat)
        return is_whole
