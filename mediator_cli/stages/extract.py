"""Sparse experts: which entries of a delta are kept, and the scale with which values lose least."""

from __future__ import annotations

import math

import torch

_CLIPS = torch.tensor([1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
_INT8_MAX = 127


def kept_count(density: float, size: int) -> int:
    """Count the entries of a tensor that are kept: the nearest whole number, at least one of a tensor not empty."""
    return min(size, max(1, round(density * size)))


def most_random(density: float, size: int) -> int:
    """Bound the entries that `keep_random` keeps: more of them have a chance below one in 10¹⁴."""
    mean = density * size
    return min(size, math.ceil(mean + 8 * math.sqrt(mean * (1 - density)) + 8))


def keep_largest(delta: torch.Tensor, threshold: float, n_ties: int) -> torch.Tensor:
    """Mask entries [m] above the threshold and the first `n_ties` that equal it; zeros are never kept."""
    magnitude = delta.abs()
    equal = magnitude == threshold
    first = equal & (equal.cumsum(0) <= n_ties)
    return ((magnitude > threshold) | first) & (magnitude > 0)


def keep_random(delta: torch.Tensor, uniforms: torch.Tensor, density: float) -> torch.Tensor:
    """Mask entries [m] with probability `density`; zeros are never kept."""
    return (uniforms < density) & (delta != 0)


def scale_candidates(bound: float) -> torch.Tensor:
    """List the scales to try for int8: the range from clipping nothing to clipping nine tenths; float64 [c]."""
    return _CLIPS * (bound / _INT8_MAX)


def scale_errors(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Sum the squared error of int8 storage under each scale [c] over values [k]; float64 [c]."""
    wide = values.double()[None]
    steps = (wide / scales[:, None]).round().clamp(-_INT8_MAX, _INT8_MAX)
    return (steps * scales[:, None] - wide).square().sum(dim=1)


def step_sums(values: torch.Tensor, scale: float) -> torch.Tensor:
    """Sum v·q and q² over values [k] stored as int8 steps q of a scale; float64 [2].

    Their ratio is the scale with the least squared error for these steps, so taking it never makes the error larger.
    """
    wide = values.double()
    steps = (wide / scale).round().clamp(-_INT8_MAX, _INT8_MAX)
    return torch.stack([(wide * steps).sum(), steps.square().sum()])


def sign_sums(values: torch.Tensor) -> torch.Tensor:
    """Sum |v| and count values [k]; float64 [2]. Their ratio is the scale with the least squared error."""
    return torch.stack([values.double().abs().sum(), torch.tensor(float(len(values)), dtype=torch.float64)])
