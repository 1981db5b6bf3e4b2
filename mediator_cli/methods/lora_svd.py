"""Sum adapters and cut the sum to a rank."""

from __future__ import annotations

from collections.abc import Sequence

from mediator_cli.kernels.arrays import Doubles
from mediator_cli.kernels.factors import Factors
from mediator_cli.methods._factors import Energy, Rank, largest_rank, product_svd, shorten, stack
from mediator_cli.methods.registry import merge_method


@merge_method(
    space="adapter",
    reference="https://huggingface.co/docs/peft/developer_guides/model_merging",
    identity_at_one=True,
)
def lora_svd(adapters: Sequence[Factors], weights: Doubles, *, rank: Rank = 0, energy: Energy = 1.0) -> Factors:
    """Sum all adapters and keep the largest singular directions of Σ wₜsₜ Bₜ·Aₜ.

    That is the nearest adapter of this rank; sₜ is the scaling of an adapter. The factors are put side by side, two QR
    decompositions make them orthonormal, and a singular value decomposition of the small matrix between them tells
    which directions to keep; the dense sum is never made.

    Apt when adapters were trained by themselves and the result shall have the rank of one of them, or just as many
    directions as hold a share `energy` of the sum.

    Not apt when every direction counts; `lora_cat` keeps all.

    Elsewhere: PEFT's combination_type `svd`, which makes the dense sum and puts all singular values into B.

    Cost: with R the sum of all ranks, (out + in)·R² for the QRs and R³ for the small matrix.

    >>> import numpy as np
    >>> one = Factors(np.array([[1, 0]], np.float32), np.array([[3], [0]], np.float32))
    >>> two = Factors(np.array([[0, 1]], np.float32), np.array([[0], [2]], np.float32))
    >>> merged = lora_svd([one, two], np.ones(2), rank=1)
    >>> np.round(merged.b @ merged.a, 4).tolist()
    [[3.0, 0.0], [0.0, 0.0]]
    """
    side_by_side = stack(adapters, weights)
    return shorten(product_svd(side_by_side.b, side_by_side.a), rank or largest_rank(adapters, energy), energy)
