"""What becomes of tensors that a method on matrices does not see whole: vectors, and by default rows of tokens."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from mediator_cli.kernels.arrays import Doubles, Floats
from mediator_cli.methods._matrix import mean_delta

Others = Annotated[
    Literal["base", "mean"],
    Field(description="What is no matrix stays the base's, or takes the mean of the deltas."),
]


def merge_others(deltas: Floats, weights: Doubles, others: Others) -> Floats:
    """Give nothing, or the mean of weights [n] · deltas [n, m]; float32 [m]."""
    return np.zeros(deltas.shape[1], np.float32) if others == "base" else mean_delta(deltas, weights, 1.0)
