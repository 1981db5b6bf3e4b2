"""Sum the factors of adapters: A and B by themselves."""

from __future__ import annotations

from collections.abc import Sequence

from mediator_cli.kernels.arrays import Doubles
from mediator_cli.kernels.factors import Factors
from mediator_cli.methods._factors import add_up, merge_each, whole
from mediator_cli.methods.registry import merge_method


@merge_method(space="adapter", reference="https://huggingface.co/docs/peft/developer_guides/model_merging")
def lora_linear(adapters: Sequence[Factors], weights: Doubles) -> Factors:
    """Sum A and B of all adapters by themselves: ΔW = (Σ √(wₜsₜ) Bₜ)·(Σ √(wₜsₜ) Aₜ).

    sₜ is the scaling of an adapter; a negative weight takes its sign in A alone. The product has cross terms Bₜ·Aᵤ, so
    it is not the sum of the deltas; the rank stays the largest of the adapters. Adapters of other ranks, or that leave
    a matrix as it is, are filled up with zeros.

    Apt when the adapters were trained from the same A, or are points of one run, so that their factors mean the same.

    Not apt when adapters were trained by themselves: their directions have no common order. `lora_cat` and `lora_svd`
    give the sum itself.

    Elsewhere: PEFT's combination_type `linear`, which refuses different ranks.

    >>> import numpy as np
    >>> one = Factors(np.ones((1, 2), np.float32), np.ones((2, 1), np.float32))
    >>> merged = lora_linear([one, one], np.ones(2))
    >>> merged.a.tolist(), (merged.b @ merged.a).tolist()
    ([[2.0, 2.0]], [[4.0, 4.0], [4.0, 4.0]])
    """
    return merge_each(adapters, weights, "factors", whole, add_up, (0, 1.0))
