"""The slabs of base + adapter in float32, without a merged copy anywhere."""

from __future__ import annotations

from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np

from mediator_cli.checkpoint.read import read_slab, widen
from mediator_cli.errors import CheckpointError, Problem
from mediator_cli.kernels.floats import is_finite
from mediator_cli.kernels.product import add_product

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path
    from typing import Any

    from numpy.typing import NDArray

    from mediator_cli.checkpoint.adapter.changes import Change, Magnitude, Product, Rows, Whole, Window
    from mediator_cli.checkpoint.adapter.open import Adapter
    from mediator_cli.checkpoint.header import TensorInfo
    from mediator_cli.checkpoint.read import Handle, Reader
    from mediator_cli.kernels.arrays import Doubles, Floats

_NORM_ELEMENTS = 1 << 16
"""Lengths of columns are summed over row blocks of about this many elements, fixed by the shape alone."""
_KEPT_BYTES = 4 << 20
"""Factors are kept for the next slab while they fit in this; the last one is kept whatever its size."""


@dataclass(frozen=True)
class _Factors:
    """The factors that were used last, oldest first; threads may share them."""

    kept: dict[Window, Floats | Doubles] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)

    def get(self, window: Window, read: Callable[[Window], Floats | Doubles]) -> Floats | Doubles:
        """Give a factor, read while the others wait unless it is kept."""
        with self.lock:
            factor = self.kept.pop(window) if window in self.kept else read(window)
            self.kept[window] = factor
            n_bytes = sum(kept.nbytes for kept in self.kept.values())
            while n_bytes > _KEPT_BYTES and len(self.kept) > 1:
                n_bytes -= self.kept.pop(next(iter(self.kept))).nbytes
            return factor


@dataclass(frozen=True)
class AdapterReader:
    """Reads the slabs of base + adapter under the base's names; a tensor has the shape that the adapter gives it."""

    base: Reader
    descriptors: Mapping[Path, Handle]
    adapter: Adapter
    _factors: _Factors = field(default_factory=_Factors, init=False, repr=False)
    _columns: dict[tuple[str, int], Doubles] = field(default_factory=dict, init=False, repr=False)
    _lock: Lock = field(default_factory=Lock, init=False, repr=False)

    def read_into(self, name: str, start: int, stop: int, out: Floats) -> bool:
        """Fill `out` [stop - start] with one slab in float32; tell whether all entries are finite."""
        change = self.adapter.changes.get(name)
        if change is None:
            return self.base.read_into(name, start, stop, out)
        # What overflows is told by the answer; numpy's warning would only say it again.
        with np.errstate(all="ignore"):
            is_whole = self._origin(name, change, start, out)
            self._apply(name, change, start, out)
        return is_whole and is_finite(out)

    def _origin(self, name: str, change: Change, start: int, out: Floats) -> bool:
        """Read what the products are added to, the base or what the adapter has instead; tell whether it is finite."""
        whole, stop = change.whole, start + len(out)
        if whole is None:
            return self.base.read_into(name, start, stop, out)
        stored = read_slab(self.descriptors, whole.info, whole.start + start, whole.start + stop)
        if whole.twin is not None:
            _check_twin(name, whole, stored, read_slab(self.descriptors, whole.twin, start, stop))
        return widen(stored, whole.info.dtype, out)

    def _apply(self, name: str, change: Change, start: int, slab: Floats) -> None:
        """Make all steps of a change on a slab that begins at flat index `start`."""
        for product in change.products:
            self._multiply(name, change, product, start, slab)
        if change.shift is not None:
            added = self._doubles(change.shift.info, start, start + len(slab)) * change.shift.scale
            slab += added.astype(np.float32)
        if change.rows is not None:
            self._replace_rows(slab, start, change.rows)

    def _multiply(self, name: str, change: Change, product: Product, start: int, slab: Floats) -> None:
        """Add a product to what a slab has of its rows, or with magnitudes put new values there."""
        columns = product.n_columns
        begin, end = product.at * columns, (product.at + product.n_rows) * columns
        low, high = max(start, begin), min(start + len(slab), end)
        if low >= high:
            return
        first, last = (low - begin) // columns, -(-(high - begin) // columns)
        part, offset = slab[low - start : high - start], low - begin - first * columns
        if product.magnitude is None:
            add_product(self._left(product, first, last), self._right(product), product.scale, offset, part)
            return
        rows = self._changed_rows(name, change, product, first, last)
        if product.magnitude.is_by_column:
            rows *= self._scales_by_column(name, change, product, product.magnitude)
        else:
            rows *= self._scales_by_row(product.magnitude, rows, first, last)
        part[:] = rows.reshape(-1)[offset : offset + len(part)]

    def _changed_rows(self, name: str, change: Change, product: Product, first: int, last: int) -> Doubles:
        """Make rows `first` to `last` of a product together with what it is added to, in float64."""
        columns = product.n_columns
        origin = np.empty((last - first) * columns, np.float32)
        self._origin(name, change, (product.at + first) * columns, origin)
        values = origin.astype(np.float64)
        add_product(self._left(product, first, last), self._right(product), product.scale, 0, values)
        return values.reshape(-1, columns)

    def _scales_by_row(self, magnitude: Magnitude, rows: Doubles, first: int, last: int) -> Doubles:
        wanted = self._doubles(magnitude.info, first, last)
        scales: Doubles = wanted / np.sqrt(np.square(rows).sum(axis=1))
        return scales[:, None]

    def _scales_by_column(self, name: str, change: Change, product: Product, magnitude: Magnitude) -> Doubles:
        """Take one pass over a tensor whose columns are scaled, the first time that one of its slabs is read."""
        key = (name, product.at)
        with self._lock:
            if key not in self._columns:
                wanted = self._doubles(magnitude.info, 0, magnitude.info.size)
                self._columns[key] = wanted / self._column_norms(name, change, product)
            return self._columns[key]

    def _column_norms(self, name: str, change: Change, product: Product) -> Doubles:
        squares = np.zeros(product.n_columns)
        n_rows = max(1, _NORM_ELEMENTS // max(1, product.n_columns))
        for row in range(0, product.n_rows, n_rows):
            rows = self._changed_rows(name, change, product, row, min(row + n_rows, product.n_rows))
            squares += np.square(rows).sum(axis=0)
        return np.sqrt(squares)

    def _replace_rows(self, slab: Floats, start: int, rows: Rows) -> None:
        columns = rows.info.shape[1]
        stop = start + len(slab)
        for place, number in enumerate(rows.numbers):
            if number * columns < stop and (number + 1) * columns > start:
                values = self._read(rows.info, place * columns, (place + 1) * columns)
                _overwrite(slab, start, number * columns, values)

    def _right(self, product: Product) -> Floats | Doubles:
        return self._factors.get(product.right, self._whole)

    def _left(self, product: Product, first: int, last: int) -> Doubles:
        """Read rows `first` to `last` of a left factor in float64."""
        window = product.left
        if window.is_flipped and window.step > 1:
            # These rows lie apart all over the stored matrix, so that they cost as much as all of it.
            return self._factors.get(window, self._whole)[first:last].astype(np.float64)
        return self._window(window, first, last).astype(np.float64, order="C")

    def _whole(self, window: Window) -> Floats | Doubles:
        return self._window(window, 0, window.shape[0]).copy(order="C")

    def _window(self, window: Window, first: int, last: int) -> Floats | Doubles:
        return read_window(self.descriptors, window, first, last)

    def _doubles(self, info: TensorInfo, start: int, stop: int) -> Doubles:
        return self._read(info, start, stop).astype(np.float64)

    def _read(self, info: TensorInfo, start: int, stop: int) -> Floats | Doubles:
        return _read_exactly(self.descriptors, info, start, stop)


def read_window(
    descriptors: Mapping[Path, Handle], window: Window, first: int = 0, last: int | None = None
) -> Floats | Doubles:
    """Read rows `first` to `last` of a matrix, in any order of its elements in memory.

    In float64 if it is stored so, else in float32, which is exact for the adapter's floats.
    """
    last = window.shape[0] if last is None else last
    width, columns = window.width, slice(window.left, None, window.step)
    if not window.is_flipped:
        top, bottom = (window.top + first) * width, (window.top + last) * width
        return _read_exactly(descriptors, window.info, top, bottom).reshape(-1, width)[:, columns]
    if window.step == 1 and last - first < window.shape[0]:
        # Of a long factor, read only the part of each row that is wanted.
        starts = [row * width + window.left for row in range(window.top, window.bottom)]
        parts = [_read_exactly(descriptors, window.info, at + first, at + last) for at in starts]
        flipped: NDArray[Any] = np.stack(parts)
        return flipped.T
    stored = _read_exactly(descriptors, window.info, window.top * width, window.bottom * width).reshape(-1, width)
    return stored[:, columns].T[first:last]


def _read_exactly(descriptors: Mapping[Path, Handle], info: TensorInfo, start: int, stop: int) -> Floats | Doubles:
    """Read elements in float64 if they are stored so, else in float32."""
    stored = read_slab(descriptors, info, start, stop)
    if info.dtype in ("F32", "F64"):
        return stored
    floats = np.empty(stop - start, np.float32)
    if not widen(stored, info.dtype, floats) and info.dtype == "F16":
        # Widening loses infinity, which must show in what is made of these.
        floats[:] = stored.view(np.float16)
    return floats


def _overwrite(slab: Floats, start: int, first: int, values: Floats | Doubles) -> None:
    """Put values that begin at flat index `first` where they belong in a slab that begins at `start`."""
    low, high = max(start, first), min(start + len(slab), first + len(values))
    slab[low - start : high - start] = values[low - first : high - first]


def _check_twin(name: str, whole: Whole, found: NDArray[Any], other: NDArray[Any]) -> None:
    if not np.array_equal(found.view(np.uint8), other.view(np.uint8)):
        twin = whole.twin.name if whole.twin else ""
        message = f"the adapter's {twin} differs from its {whole.info.name}, but the base has one tensor for both"
        hint = "give the base a head of its own (tie_word_embeddings false), and name that as the base"
        raise CheckpointError(Problem(name, message, hint))
