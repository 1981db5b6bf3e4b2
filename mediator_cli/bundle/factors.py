"""What an expert adds to a matrix as two small matrices, which is how adapters are trained; see README.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mediator_cli.bundle.factor_writer import add_factors
from mediator_cli.bundle.sparse_writer import create_sparse_file

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from mediator_cli.kernels.factors import Factors


@dataclass(frozen=True)
class FactorDelta:
    """What an expert adds to a matrix [out, in]: b · a, with a [rank, in] and b [out, rank], float32."""

    a: torch.Tensor
    b: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        return self.b.shape[0], self.a.shape[1]

    def add_to(self, dense: torch.Tensor, weight: float = 1.0) -> torch.Tensor:
        """Add weight · delta to a dense tensor in float32 and round once to its dtype."""
        mixed = dense.flatten().to(torch.float32, copy=True)
        self.add_into(mixed, weight)
        return mixed.to(dense.dtype).view(dense.shape)

    def add_into(self, mixed: torch.Tensor, weight: float) -> None:
        """Add weight · delta to a flat float32 tensor in place."""
        a, b = self.a.to(mixed.device), self.b.to(mixed.device)
        mixed.view(self.shape).addmm_(b, a, alpha=weight)

    def flat(self) -> torch.Tensor:
        """Give all entries as float32 [size]."""
        return (self.b @ self.a).flatten()


def as_delta(factors: Factors) -> FactorDelta:
    """See factors as what they add, the scaling multiplied into b."""
    return FactorDelta(torch.from_numpy(factors.a), torch.from_numpy(factors.b) * factors.scaling)


def write_factors(file: Path, expert: str, factors: Mapping[str, Factors]) -> None:
    """Write a low-rank expert's file, which must not exist; matrices that bfloat16 holds exactly are stored so.

    Raises OutputError when the disk refuses.
    """
    with create_sparse_file(file, expert, list(factors)) as writer:
        for name, own in factors.items():
            add_factors(writer, name, own)
        writer.sync()
        writer.finish()
