"""Sparse experts: how many entries of a delta are kept, and the scale with which values lose least."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from mediator_cli.kernels.sparse import sum_magnitudes, sum_step_errors, sum_steps

if TYPE_CHECKING:
    from mediator_cli.kernels.arrays import Doubles, Floats

_CLIPS = np.array([1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
_INT8_MAX = 127


def kept_count(density: float, size: int) -> int:
    """Count the entries of a tensor that are kept: the nearest whole number, at least one of a tensor not empty."""
    return min(size, max(1, round(density * size)))


def most_random(density: float, size: int) -> int:
    """Bound the entries kept at random with a chance of `density`: more have a chance below one in 10¹⁴."""
    mean = density * size
    return min(size, math.ceil(mean + 8 * math.sqrt(mean * (1 - density)) + 8))


def scale_candidates(bound: float) -> Doubles:
    """List the scales to try for int8: the range from clipping nothing to clipping nine tenths; [c]."""
    return _CLIPS * (bound / _INT8_MAX)


def scale_errors(values: Floats, scales: Doubles) -> Doubles:
    """Sum the squared error of int8 storage under each scale [c] over values [k]; [c]."""
    return sum_step_errors(values, scales)


def step_sums(values: Floats, scale: float) -> Doubles:
    """Sum v·q and q² over values [k] stored as int8 steps q of a scale; [2].

    Their ratio is the scale with the least squared error for these steps, so taking it never makes the error larger.
    """
    return np.array(sum_steps(values, scale))


def sign_sums(values: Floats) -> Doubles:
    """Sum |v| and count values [k]; [2]. Their ratio is the scale with the least squared error."""
    return np.array([sum_magnitudes(values), len(values)])
