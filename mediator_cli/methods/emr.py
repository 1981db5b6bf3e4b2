"""Elect one delta that serves all experts."""

from __future__ import annotations

from mediator_cli.kernels.arrays import Doubles, Floats
from mediator_cli.kernels.unify import unify
from mediator_cli.methods._ops import Lambda, floats
from mediator_cli.methods.registry import merge_method


@merge_method(space="delta", reference="https://arxiv.org/abs/2405.17461", identity_at_one=True)
def emr(deltas: Floats, weights: Doubles, *, lambda_: Lambda = 1.0) -> Floats:
    """Elect a sign for each entry and take the largest change that has it: W₀ + λ · τ_uni.

    γ = sign(Σ wₜ·τₜ), minus where that is zero; τ_uni = γ · max |wₜ·τₜ| over the experts with that sign, zero where
    there is none. This is what EMR-Merging (elect, mask, rescale) stores once for all experts; as one static model it
    goes without their masks and scales.

    Apt when experts change different entries: nothing is averaged away. The largest of many changes is larger than
    their mean, so λ of 0.3 to 0.5 is a better start where experts overlap.

    Not apt when one model has to be as good as each expert: the method's own claim needs the masks and scales.

    Elsewhere: the authors' code elects by the mean of deltas, which has the same sign, and adds masks and scales.

    >>> import numpy as np
    >>> emr(np.array([[3, 2, -1], [1, -5, -4]], np.float32), np.ones(2), lambda_=0.5).tolist()
    [1.5, -2.5, -2.0]
    """
    return floats(unify(deltas, weights) * floats([lambda_]))
