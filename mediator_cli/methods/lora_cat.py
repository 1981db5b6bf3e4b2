"""Put the factors of adapters side by side: the exact weighted sum."""

from __future__ import annotations

from collections.abc import Sequence

from mediator_cli.kernels.arrays import Doubles
from mediator_cli.kernels.factors import Factors
from mediator_cli.methods._factors import stack
from mediator_cli.methods.registry import merge_method


@merge_method(space="adapter", reference="https://arxiv.org/abs/2410.13025", identity_at_one=True)
def lora_cat(adapters: Sequence[Factors], weights: Doubles) -> Factors:
    """Put all factors side by side, which gives the exact weighted sum: ΔW = Σ wₜsₜ Bₜ·Aₜ.

    A of the result has the rows wₜsₜ·Aₜ, B has the columns Bₜ; sₜ is the scaling of an adapter. The rank is the sum of
    all ranks.

    Apt when nothing may be lost and a larger adapter is no matter.

    Not apt when there are many adapters, or the result must have a given rank: `lora_svd` cuts the same sum.

    Elsewhere: PEFT's combination_type `cat`. The authors of LoRA Soups learn the weights on data; here they are given.

    >>> import numpy as np
    >>> one = Factors(np.ones((1, 2), np.float32), np.ones((2, 1), np.float32))
    >>> merged = lora_cat([one, one], np.array([1.0, 0.5]))
    >>> merged.a.tolist(), (merged.b @ merged.a).tolist()
    ([[1.0, 1.0], [0.5, 0.5]], [[1.5, 1.5], [1.5, 1.5]])
    """
    return stack(adapters, weights)
