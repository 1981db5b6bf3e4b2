"""What an adapter adds to one matrix, as the two small matrices that it consists of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mediator_cli.kernels.arrays import Floats


@dataclass(frozen=True)
class Factors:
    """What an adapter adds to one matrix: scaling · b · a, with a [rank, in] and b [out, rank] in float32.

    Rank 0 is no change: that of an adapter which leaves the matrix as it is.
    """

    a: Floats
    b: Floats
    scaling: float = 1.0

    @property
    def rank(self) -> int:
        """Number of rows of a."""
        return int(self.a.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        return self.b.shape[0], self.a.shape[1]
