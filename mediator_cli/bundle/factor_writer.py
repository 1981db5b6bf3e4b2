"""Write the two small matrices of a low-rank expert into its file; see README.md. No torch here."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mediator_cli.bundle.sparse_file import SparseTensor
from mediator_cli.checkpoint.read import narrow

if TYPE_CHECKING:
    from mediator_cli.bundle.sparse_writer import SparseFileWriter
    from mediator_cli.kernels.arrays import Floats
    from mediator_cli.kernels.factors import Factors


class WrittenFactors(NamedTuple):
    """What the header says of a pair, and the dtype in which it is stored."""

    spec: SparseTensor
    dtype: str


def add_factors(writer: SparseFileWriter, name: str, factors: Factors) -> WrittenFactors:
    """Append the pair of one matrix to a file, as bfloat16 where that holds both exactly, else as float32.

    Raises OutputError when the disk refuses.
    """
    dtype = "BF16" if _is_exact(factors.a) and _is_exact(factors.b) else "F32"
    spec = SparseTensor(
        shape=factors.shape,
        n_kept=factors.shape[0] * factors.shape[1],
        index="all",
        values="factors",
        scale=factors.scaling,
        rank=factors.rank,
    )
    places = writer.place(name, spec, dtype, 0)
    for kind, values in (("a", factors.a), ("b", factors.b)):
        writer.write(places[kind], narrow(np.ascontiguousarray(values).reshape(-1), dtype)[0])
    return WrittenFactors(spec, dtype)


def _is_exact(values: Floats) -> bool:
    """Whether bfloat16 holds all values as they are."""
    return not (np.ascontiguousarray(values).view(np.uint32) & 0xFFFF).any()
