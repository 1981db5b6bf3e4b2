"""Sum the deltas and make all singular values equal."""

from __future__ import annotations

import numpy as np

from mediator_cli.kernels.arrays import Doubles, Floats
from mediator_cli.methods._matrix import Embeddings, mean_delta, reshape_spectrum, summed
from mediator_cli.methods._ops import Lambda
from mediator_cli.methods.registry import merge_method
from mediator_cli.methods.statistics import linear_maps


def _working_bytes(n: int, rows: int, columns: int) -> int:
    """Three matrices of the tensor's shape and what eigenvalues of the shorter side take."""
    return 8 * (4 * rows * columns + 7 * min(rows, columns) ** 2)


@merge_method(
    space="delta",
    reference="https://arxiv.org/abs/2502.04959",
    view=linear_maps,
    working_bytes=_working_bytes,
)
def iso_c(deltas: Floats, weights: Doubles, *, lambda_: Lambda = 1.0, embeddings: Embeddings = "average") -> Floats:
    """Add the deltas of a matrix, then replace its singular values by their mean.

    Δ = Σ wₜ·τₜ = U·S·Vᵀ becomes λ · mean(S)·U·Vᵀ: directions that few experts need count as much as those that all
    share. Singular values that rounding of float32 may have made count as zero; the mean is over the others, and
    only their directions are used. All that is no matrix is averaged: λ · Σ wₜ·τₜ / n.

    Apt when experts come from different tasks and were fine-tuned in full.

    Not apt when deltas are full of noise, as of short training in 16 bits: it gets as loud as the rest. A merged
    LoRA of low rank is a matrix of full rank once it is rounded to 16 bits.

    Elsewhere: the authors and fusion_bench average over all min(rows, columns) singular values, which is the same
    where the rank is full; else they fill up with directions by chance. They treat embeddings as matrices, which
    was made for vision models: `embeddings: matrix` does that.

    Cost: one eigendecomposition per matrix, of the shorter side.

    >>> import numpy as np
    >>> iso_c(np.array([[[3, 0], [0, 0]], [[0, 0], [0, 1]]], np.float32), np.ones(2)).tolist()
    [[2.0, 0.0], [0.0, 2.0]]
    """
    if deltas.ndim == 2:
        return mean_delta(deltas, weights, lambda_)
    flat = reshape_spectrum(summed(deltas, weights), lambda s: lambda_ * s.mean() / s if len(s) else s)
    return flat.astype(np.float32)
