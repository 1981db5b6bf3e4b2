"""Weights before any training: those of projectors and of the router. The same on every run with the same seed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING

import numpy as np

from mediator_cli.runtime.classify import class_means, fit_classifier, logits, standardisation

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mediator_cli.kernels.arrays import Floats
    from mediator_cli.recipe.heterogeneous import ProjectorSpec

_MARGIN = 4.0
"""Most that the median difference between a prompt's two highest logits is at the start: α = 0.98 of two experts."""


@dataclass(frozen=True)
class RouterStart:
    """The router before training: weight [experts, width] and bias [experts]."""

    weight: Floats
    bias: Floats

    def logits(self, features: NDArray[np.floating]) -> NDArray[np.float64]:
        """Score features [rows, width] for each expert [rows, experts]."""
        found: NDArray[np.float64] = features.astype(np.float64) @ self.weight.T.astype(np.float64) + self.bias
        return found


def normal(seed: int, name: str, shape: tuple[int, ...], std: float) -> Floats:
    """Draw a tensor's random weights, keyed by the seed and the tensor's name."""
    key = int.from_bytes(hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=16).digest(), "little")
    drawn: Floats = np.random.Generator(np.random.Philox(key=key)).standard_normal(shape, np.float32)
    return drawn * np.float32(std)


def projector_weight(spec: ProjectorSpec, seed: int, name: str, shape: tuple[int, ...], *, is_last: bool) -> Floats:
    """Make one layer's weight [to, from]: zeros for the last one of `identity`, else N(0, 1/from)."""
    if spec.init == "identity" and is_last:
        return np.zeros(shape, np.float32)
    return normal(seed, name, shape, 1 / sqrt(shape[1]))


def random_router(seed: int, name: str, shape: tuple[int, int]) -> RouterStart:
    """Draw a router [experts, width] from N(0, 1/width)."""
    return RouterStart(normal(seed, name, shape, 1 / sqrt(shape[1])), np.zeros(shape[0], np.float32))


def fitted_router(kind: str, features: NDArray[np.floating], labels: NDArray[np.int64], n_experts: int) -> RouterStart:
    """Fit a router to mean embeddings [rows, width] of prompts and the expert of each [rows].

    `prototype` is the nearest mean of standardised features: logit m·z - |m|²/2; `logistic` a regression on them.
    """
    x = features.astype(np.float64)
    if kind == "prototype":
        mean, scale = standardisation(x.mean(axis=0), x.var(axis=0))
        coefficients = class_means((x - mean) / scale, labels, n_experts)
        intercepts = -0.5 * np.square(coefficients).sum(axis=1)
        scores = (x - mean) / scale @ coefficients.T + intercepts
    else:
        fitted = fit_classifier("logistic", x, labels, n_experts)
        mean, scale, coefficients, intercepts = fitted.mean, fitted.scale, fitted.coefficients, fitted.intercepts
        scores = logits(fitted, x)
    ordered = np.sort(scores, axis=1)
    sharpness = min(1.0, _MARGIN / max(float(np.median(ordered[:, -1] - ordered[:, -2])), 1e-9))
    weight = sharpness * coefficients / scale
    bias = sharpness * intercepts - weight @ mean
    return RouterStart(weight.astype(np.float32), bias.astype(np.float32))
