"""Weights above 0 whose sum is 1, by exponentiated gradient on convex losses, with a bound on what is left to gain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Loss = Callable[[Floats], tuple[float, Floats]]

_GROWTH, _SHRINK = 1.5, 0.5
_LEAST = 1e-12


@dataclass(frozen=True, eq=False)
class Found:
    """Weights, their loss, and `gap`: by how much the best weights may be better at most, in nats."""

    weights: Floats
    loss: float
    gap: float
    steps: int


def minimise(loss: Loss, n: int, *, tolerance: float = 1e-5, most_steps: int = 2000) -> Found:
    """Find the weights [n] of the least loss; `loss` gives a value, convex in the weights, and its gradient [n].

    w ← w · exp(-η·gradient), normalised (Kivinen and Warmuth 1997); η grows while the loss falls and shrinks where not.
    The gap is max over i of gradient · (w - eᵢ) (Frank and Wolfe 1956), zero at the optimum and only there.
    """
    weights = np.full(n, 1 / n)
    value, gradient = loss(weights)
    rate, steps = 1.0, 0
    while (gap := float(gradient @ weights - gradient.min())) > tolerance and steps < most_steps and rate > _LEAST:
        steps += 1
        moved = weights * np.exp(-rate * (gradient - gradient.min()))
        # A weight that has become zero could never come back.
        moved = np.maximum(moved / moved.sum(), _LEAST)
        moved /= moved.sum()
        new, new_gradient = loss(moved)
        if new <= value:
            weights, value, gradient = moved, new, new_gradient
            rate *= _GROWTH
        else:
            rate *= _SHRINK
    return Found(weights, value, gap, steps)


def mixture_loss(log_probs: Floats, shares: Floats) -> Loss:
    """Give the loss -Σ share · ln Σᵢ wᵢ pᵢ of log-probabilities [tokens, models], tokens counted by shares [tokens]."""
    top = log_probs.max(axis=1, keepdims=True)
    scaled = np.exp(log_probs - top)
    constant = -float(shares @ top[:, 0])

    def loss(weights: Floats) -> tuple[float, Floats]:
        mixed = scaled @ weights
        return constant - float(shares @ np.log(mixed)), -(shares / mixed) @ scaled

    return loss


def geometric_loss(wanted: Floats, shares: Floats, kept: Floats, tail: Floats) -> Loss:
    """Give a bound on the loss of Π pᵢ^wᵢ / Z, no more than the tails' part of Z above it, convex like the loss itself.

    `wanted` [tokens, models], `kept` [tokens, n, models] are log-probabilities, `tail` [tokens, models] the logarithms
    of all that is not kept. By Hölder's inequality the part of Z that is not kept is at most Π tailᵢ^wᵢ.
    """
    terms = np.concatenate([kept, tail[:, None]], axis=1)
    # Of tokens that are not there, exp(-inf · 0) would be no number.
    terms = np.where(np.isfinite(terms), terms, -1e4)

    def loss(weights: Floats) -> tuple[float, Floats]:
        exponents = terms @ weights
        top = exponents.max(axis=1, keepdims=True)
        parts = np.exp(exponents - top)
        total = parts.sum(axis=1, keepdims=True)
        value = float(shares @ (top[:, 0] + np.log(total[:, 0]) - wanted @ weights))
        gradient = np.einsum("t,tn,tnm->m", shares, parts / total, terms) - shares @ wanted
        return value, gradient

    return loss
