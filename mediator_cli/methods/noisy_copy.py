"""One expert, scaled, with noise."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field
from scipy.special import ndtri

from mediator_cli.kernels.arrays import Doubles, Floats
from mediator_cli.methods._ops import weighted_sum
from mediator_cli.methods.registry import merge_method

_LEAST = 2.0**-25


@merge_method(
    space="weight",
    reference="https://github.com/arcee-ai/mergekit/blob/main/docs/moe.md",
    n_inputs=(1, 1),
    random=True,
    uses_weights=False,
)
def noisy_copy(
    tensors: Floats,
    weights: Doubles,
    *,
    scale: Annotated[float, Field(allow_inf_nan=False, description="Factor on every entry, its noise included.")] = 1.0,
    noise: Annotated[float, Field(ge=0, allow_inf_nan=False, description="Standard deviation of the noise.")] = 0.0,
    uniforms: Floats,
) -> Floats:
    """Pass the only expert's tensors on with Gaussian noise added: scale · (W₁ + noise · N(0, 1)).

    Each normal number is the quantile of one uniform number; the base and the weight of the recipe have no say.

    Apt when copies of one expert shall differ, so that training can tell them apart, as in sparse upcycling.

    Not apt when anything is to be merged.

    >>> import numpy as np
    >>> noisy_copy(np.array([[2, -4]], np.float32), np.ones(1), scale=0.5, noise=1.0,
    ...            uniforms=np.array([[0.5, 0.5]], np.float32)).tolist()
    [1.0, -2.0]
    """
    # A uniform number may be 0, whose quantile is infinite.
    normals = ndtri(np.maximum(uniforms[0], np.float32(_LEAST)).astype(np.float64))
    return weighted_sum(tensors + np.float32(noise) * normals.astype(np.float32), [scale])
