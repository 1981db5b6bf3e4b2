"""What an expert adds to a matrix as two small matrices, which is how adapters are trained; see README.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from mediator_cli.bundle.sparse_file import SparseTensor
from mediator_cli.bundle.sparse_writer import create_sparse_file
from mediator_cli.checkpoint.read import narrow

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from mediator_cli.kernels.arrays import Floats
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
            dtype = "BF16" if _is_exact(own.a) and _is_exact(own.b) else "F32"
            spec = SparseTensor(
                shape=own.shape,
                n_kept=own.shape[0] * own.shape[1],
                index="all",
                values="factors",
                scale=own.scaling,
                rank=own.rank,
            )
            places = writer.place(name, spec, dtype, 0)
            for kind, values in (("a", own.a), ("b", own.b)):
                writer.write(places[kind], narrow(np.ascontiguousarray(values).reshape(-1), dtype)[0])
        writer.sync()
        writer.finish()


def _is_exact(values: Floats) -> bool:
    """Whether bfloat16 holds all values as they are."""
    return not (np.ascontiguousarray(values).view(np.uint32) & 0xFFFF).any()
