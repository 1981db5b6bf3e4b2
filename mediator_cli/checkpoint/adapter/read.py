"""The slabs of base + adapter in float32, without a merged copy anywhere."""

from __future__ import annotations

from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING

import torch

from mediator_cli.checkpoint.read import read_slab
from mediator_cli.errors import CheckpointError, Problem

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from mediator_cli.checkpoint.adapter.changes import Change, Magnitude, Product, Rows, Whole, Window
    from mediator_cli.checkpoint.adapter.open import Adapter
    from mediator_cli.checkpoint.header import TensorInfo
    from mediator_cli.checkpoint.read import Reader

_PRODUCT_ELEMENTS = 1 << 18
"""Products are made in row blocks of about this many elements, fixed by the shape, so that slabs cannot change bits."""


@dataclass(frozen=True)
class AdapterReader:
    """Reads the slabs of base + adapter under the base's names; a tensor has the shape that the adapter gives it."""

    base: Reader
    descriptors: Mapping[Path, int]
    adapter: Adapter
    _lengths: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict, init=False, repr=False)
    _lock: Lock = field(default_factory=Lock, init=False, repr=False)

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Read one slab [stop - start] as float32."""
        change = self.adapter.changes.get(name)
        if change is None:
            return self.base.read(name, start, stop)
        slab = self._origin(name, change, start, stop).clone()
        for product in change.products:
            put = _add if product.magnitude is None else _overwrite
            for first, values in self._blocks(name, change, product, start, stop):
                put(slab, start, first, values)
        if change.shift is not None:
            added = self._doubles(change.shift.info, start, stop) * change.shift.scale
            slab += added.float()
        if change.rows is not None:
            self._replace_rows(slab, start, change.rows)
        return slab

    def _origin(self, name: str, change: Change, start: int, stop: int) -> torch.Tensor:
        """Read what the products are added to: the base, or what the adapter has in its place."""
        if change.whole is None:
            return self.base.read(name, start, stop)
        whole = change.whole
        slab = read_slab(self.descriptors, whole.info, whole.start + start, whole.start + stop)
        if whole.twin is not None:
            _check_twin(name, whole, slab, read_slab(self.descriptors, whole.twin, start, stop))
        return slab.float()

    def _blocks(
        self, name: str, change: Change, product: Product, start: int, stop: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Make all blocks of a product that a slab touches, each with its first flat index.

        They are what is added, or with magnitudes the new values themselves.
        """
        columns = product.n_columns
        begin, end = product.at * columns, (product.at + product.n_rows) * columns
        low, high = max(start, begin), min(stop, end)
        if low >= high:
            return
        n_rows = _block_rows(columns)
        right = self._window(product.right, 0, product.right.shape[0])
        factors = self._lengths_by_column(name, change, product, right)
        for row in range((low - begin) // columns // n_rows * n_rows, -(-(high - begin) // columns), n_rows):
            last = min(row + n_rows, product.n_rows)
            values = self._delta(product, right, row, last)
            if product.magnitude is not None:
                origin = self._origin(name, change, begin + row * columns, begin + last * columns)
                values += origin.view(-1, columns)
                values *= factors if factors is not None else self._lengths_by_row(product.magnitude, values, row, last)
            yield begin + row * columns, values.float().flatten()

    def _delta(self, product: Product, right: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """Multiply in float64, so that the float32 result hardly depends on the order of the sum."""
        return (self._window(product.left, first, last) @ right) * product.scale

    def _lengths_by_row(self, magnitude: Magnitude, rows: torch.Tensor, first: int, last: int) -> torch.Tensor:
        wanted = self._doubles(magnitude.info, first, last)
        return (wanted / rows.square().sum(dim=1).sqrt())[:, None]

    def _lengths_by_column(
        self, name: str, change: Change, product: Product, right: torch.Tensor
    ) -> torch.Tensor | None:
        """Take one pass over a tensor whose columns are scaled, the first time that one of its slabs is read."""
        magnitude = product.magnitude
        if magnitude is None or not magnitude.is_by_column:
            return None
        key = (name, product.at)
        with self._lock:
            if key not in self._lengths:
                wanted = self._doubles(magnitude.info, 0, magnitude.info.size)
                self._lengths[key] = wanted / self._column_norms(name, change, product, right)
            return self._lengths[key]

    def _column_norms(self, name: str, change: Change, product: Product, right: torch.Tensor) -> torch.Tensor:
        columns = product.n_columns
        squares = torch.zeros(columns, dtype=torch.float64)
        n_rows = _block_rows(columns)
        for row in range(0, product.n_rows, n_rows):
            last = min(row + n_rows, product.n_rows)
            origin = self._origin(name, change, (product.at + row) * columns, (product.at + last) * columns)
            rows = origin.double().view(-1, columns) + self._delta(product, right, row, last)
            squares += rows.square().sum(dim=0)
        return squares.sqrt()

    def _replace_rows(self, slab: torch.Tensor, start: int, rows: Rows) -> None:
        columns = rows.info.shape[1]
        stop = start + len(slab)
        for place, number in enumerate(rows.numbers):
            if number * columns < stop and (number + 1) * columns > start:
                values = read_slab(self.descriptors, rows.info, place * columns, (place + 1) * columns)
                _overwrite(slab, start, number * columns, values.float())

    def _window(self, window: Window, first: int, last: int) -> torch.Tensor:
        """Read rows `first` to `last` of a matrix in float64."""
        width, columns = window.width, slice(window.left, None, window.step)
        if not window.is_flipped:
            top, bottom = (window.top + first) * width, (window.top + last) * width
            return self._doubles(window.info, top, bottom).view(-1, width)[:, columns]
        if window.step == 1 and last - first < window.shape[0]:
            # Of a long factor, read only the part of each row that is wanted.
            starts = [row * width + window.left for row in range(window.top, window.bottom)]
            return torch.stack([self._doubles(window.info, at + first, at + last) for at in starts]).T
        stored = self._doubles(window.info, window.top * width, window.bottom * width).view(-1, width)
        return stored[:, columns].T[first:last]

    def _doubles(self, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
        return read_slab(self.descriptors, info, start, stop).double()


def _block_rows(columns: int) -> int:
    return max(1, _PRODUCT_ELEMENTS // max(1, columns))


def _add(slab: torch.Tensor, start: int, first: int, values: torch.Tensor) -> None:
    low, high = max(start, first), min(start + len(slab), first + len(values))
    slab[low - start : high - start] += values[low - first : high - first]


def _overwrite(slab: torch.Tensor, start: int, first: int, values: torch.Tensor) -> None:
    """Put values that begin at flat index `first` where they belong in a slab that begins at `start`."""
    low, high = max(start, first), min(start + len(slab), first + len(values))
    slab[low - start : high - start] = values[low - first : high - first]


def _check_twin(name: str, whole: Whole, found: torch.Tensor, other: torch.Tensor) -> None:
    if not torch.equal(found.view(torch.uint8), other.view(torch.uint8)):
        twin = whole.twin.name if whole.twin else ""
        message = f"the adapter's {twin} differs from its {whole.info.name}, but the base has one tensor for both"
        hint = "give the base a head of its own (tie_word_embeddings false), and name that as the base"
        raise CheckpointError(Problem(name, message, hint))
