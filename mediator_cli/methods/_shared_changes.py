"""What several experts changed, and what one alone did (RAM)."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from mediator_cli.kernels.arrays import Doubles, Floats
from mediator_cli.methods import _kernels_averages as kernels
from mediator_cli.methods._ops import floats

Epsilon = Annotated[
    float, Field(ge=0, allow_inf_nan=False, description="An entry counts as changed if its delta is larger than this.")
]


def count_shared(deltas: Floats, epsilon: float) -> Doubles:
    """Count each expert's changed entries of deltas [n, m] that others changed too, and the rest; float64 [2, n]."""
    counts = np.empty((2, len(deltas)), np.float64)
    kernels.count_shared(floats(deltas), np.float32(epsilon), counts)
    return counts


def merge_shared(deltas: Floats, weights: Doubles, epsilon: float, boosts: Doubles) -> Floats:
    """Average what several experts changed, and take what one alone did times its boost [n]; float32 [m]."""
    merged = np.empty(deltas.shape[1], np.float32)
    kernels.merge_shared(floats(deltas), floats(weights), np.float32(epsilon), floats(boosts), merged)
    return merged
