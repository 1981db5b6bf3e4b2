"""Adam (https://arxiv.org/abs/1412.6980) in float32, as the common frameworks compute it, without weight decay."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt

import numpy as np

from mediator_cli.kernels.arrays import Floats
from mediator_cli.kernels.jit import kernel

_BETAS = 0.9, 0.999


def descend(start: Floats, gradient: Callable[[Floats, Floats], None], iterations: int, learning_rate: float) -> Floats:
    """Go down from `start` in steps of at most about the learning rate for each entry; gives a new array.

    `gradient` writes the gradient at its first argument to its second, both of the shape of `start`.
    """
    value, first, second = start.copy(), np.zeros_like(start), np.zeros_like(start)
    found = np.empty_like(start)
    for step in range(1, iterations + 1):
        gradient(value, found)
        rate, root = learning_rate / (1 - _BETAS[0] ** step), sqrt(1 - _BETAS[1] ** step)
        _step(found.ravel(), np.float32(rate), np.float32(root), first.ravel(), second.ravel(), value.ravel())
    return value


@kernel
def _step(gradient: Floats, rate: np.float32, root: np.float32, first: Floats, second: Floats, value: Floats) -> None:
    """Update both moments [m] and the value [m] in one pass."""
    fresh, kept, fresh_square, least = np.float32(0.1), np.float32(0.999), np.float32(0.001), np.float32(1e-8)
    for i in range(gradient.shape[0]):
        found = gradient[i]
        mean = first[i] + (found - first[i]) * fresh
        square = second[i] * kept + found * found * fresh_square
        first[i], second[i] = mean, square
        value[i] -= rate * mean / (np.sqrt(square) / root + least)
