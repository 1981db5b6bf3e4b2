"""What an adapter makes of the base's tensors, as data: products of two small matrices, and stored values.

Every tensor is looked at as a matrix: its last dimension are the columns, or, of a convolution, all but the first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mediator_cli.checkpoint.header import TensorInfo


@dataclass(frozen=True)
class Window:
    """A matrix cut out of a stored one of `width` columns: rows `top` to `bottom`, every `step`-th column from `left`.

    `is_flipped`: it is then transposed.
    """

    info: TensorInfo
    width: int
    top: int
    bottom: int
    left: int = 0
    step: int = 1
    is_flipped: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        rows, columns = self.bottom - self.top, len(range(self.left, self.width, self.step))
        return (columns, rows) if self.is_flipped else (rows, columns)


@dataclass(frozen=True)
class Magnitude:
    """DoRA's lengths: rows, or columns, of base + product are scaled to the length that is stored for them."""

    info: TensorInfo
    is_by_column: bool


@dataclass(frozen=True)
class Product:
    """Rows `at` on of a tensor change by scale · left · right."""

    left: Window
    right: Window
    scale: float
    at: int = 0
    magnitude: Magnitude | None = None

    @property
    def n_rows(self) -> int:
        """Number of rows that change."""
        return self.left.shape[0]

    @property
    def n_columns(self) -> int:
        """Number of columns, those of the whole tensor."""
        return self.right.shape[1]


@dataclass(frozen=True)
class Whole:
    """Stored values in place of the base's, from element `start` of `info`; `twin` must hold the same ones."""

    info: TensorInfo
    start: int = 0
    twin: TensorInfo | None = None


@dataclass(frozen=True)
class Shift:
    """scale · info is added."""

    info: TensorInfo
    scale: float


@dataclass(frozen=True)
class Rows:
    """Rows of the given numbers are replaced by those of `info`, in its order."""

    info: TensorInfo
    numbers: tuple[int, ...]


@dataclass(frozen=True)
class Change:
    """What an adapter makes of one tensor, whose shape is then `shape`: each step works on what the one before gave."""

    shape: tuple[int, ...]
    whole: Whole | None = None
    products: tuple[Product, ...] = ()
    shift: Shift | None = None
    rows: Rows | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)
