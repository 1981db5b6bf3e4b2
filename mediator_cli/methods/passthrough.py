"""One expert as it is, or scaled."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mediator_cli.kernels.arrays import Doubles, Floats
from mediator_cli.methods._ops import weighted_sum
from mediator_cli.methods.registry import merge_method


@merge_method(
    space="weight",
    reference="https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md",
    n_inputs=(1, 1),
    identity_at_one=True,
    uses_weights=False,
)
def passthrough(
    tensors: Floats,
    weights: Doubles,
    *,
    scale: Annotated[float, Field(allow_inf_nan=False, description="Factor on every entry.")] = 1.0,
) -> Floats:
    """Pass the only expert's tensors on, times a factor.

    scale·W₁; the base and the weight of the recipe have no say.

    Apt when some tensors shall be damped: an override may give each its scale, such as 0 for the projections
    that write a layer's results, which then changes nothing.

    Not apt when anything is to be merged.

    >>> import numpy as np
    >>> passthrough(np.array([[2, -4]], np.float32), np.ones(1), scale=0.5).tolist()
    [1.0, -2.0]
    """
    return weighted_sum(tensors, [scale])
