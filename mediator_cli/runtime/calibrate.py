"""Probabilities that mean what they say: temperature, and how far a router's probabilities are from its results."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Ints = NDArray[np.integer]

_HALVINGS = 60
_WIDEST = 1e3
"""Temperatures are searched from the spread of the logits divided by this to the spread times this."""


def softmax(logits: Floats, temperature: float = 1.0) -> Floats:
    """Turn logits [rows, experts] into probabilities [rows, experts]; a higher temperature makes them more alike."""
    scaled = (logits - logits.max(axis=1, keepdims=True)) / temperature
    powers = np.exp(scaled)
    probabilities: Floats = powers / powers.sum(axis=1, keepdims=True)
    return probabilities


def fit_temperature(logits: Floats, labels: Ints) -> float:
    """Find the temperature with the least log loss on held-out logits [rows, experts] and true experts [rows].

    Labels are smoothed by as much as one row of unknown expert weighs, so that a held-out set without a single error,
    whose log loss has no minimum, does not make the router infinitely sure (as in Platt 1999, section 2.2). The loss is
    convex in 1/temperature (Guo et al. 2017, arXiv:1706.04599): its slope is followed to zero by bisection.
    Returns 1 when no expert's logit differs from another's.
    """
    centred = logits - logits.mean(axis=1, keepdims=True)
    spread = float(np.sqrt(np.square(centred).mean()))
    if spread == 0.0:
        return 1.0
    unit = centred / spread
    n_rows = len(unit)
    # Rows are centred, so the share of the label that goes to all experts alike adds nothing.
    target = unit[np.arange(n_rows), labels].sum() / (n_rows + 1)
    low, high = -math.log(_WIDEST), math.log(_WIDEST)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        expected = (softmax(unit, math.exp(middle)) * unit).sum(axis=1).mean()
        low, high = (middle, high) if expected > target else (low, middle)
    return spread * math.exp((low + high) / 2)


def log_loss(probabilities: Floats, labels: Ints) -> float:
    """Mean of -ln p of the true expert [rows] under probabilities [rows, experts], in nats."""
    true = probabilities[np.arange(len(labels)), labels]
    return float(-np.log(np.maximum(true, np.finfo(np.float64).eps)).mean())


def calibration_error(probabilities: Floats, labels: Ints, bins: int = 15) -> float:
    """Expected calibration error: |accuracy - confidence| in equal bins of confidence, weighted by their rows.

    Formula: Guo et al. 2017, equation 3. A confidence on an edge counts to the lower bin.

    >>> calibration_error(np.array([[0.8, 0.2], [0.8, 0.2]]), np.array([0, 1]))  # sure at 0.8, right half the time
    0.30000000000000004
    """
    confidence = probabilities.max(axis=1)
    is_right = probabilities.argmax(axis=1) == labels
    places = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    gaps = np.bincount(places, weights=is_right - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(labels))


def confusion(labels: Ints, chosen: Ints, n_experts: int) -> NDArray[np.int64]:
    """Count rows by true expert and chosen expert [experts, experts]."""
    cells = labels.astype(np.int64) * n_experts + chosen
    return np.bincount(cells, minlength=n_experts**2).reshape(n_experts, n_experts)


def auroc(scores: Floats, is_positive: NDArray[np.bool_]) -> float:
    """Probability that a positive row scores above a negative one, ties counting half; NaN without one of them.

    Mann-Whitney: from the mean ranks of the scores [rows], exact.

    >>> auroc(np.array([0.1, 0.4, 0.4, 0.9]), np.array([False, False, True, True]))
    0.875
    """
    n_positive = int(is_positive.sum())
    n_pairs = n_positive * (len(scores) - n_positive)
    if n_pairs == 0:
        return math.nan
    _, places, counts = np.unique(scores, return_inverse=True, return_counts=True)
    mean_ranks = np.cumsum(counts) - (counts - 1) / 2
    rank_sum = mean_ranks[places[is_positive]].sum()
    return float((rank_sum - n_positive * (n_positive + 1) / 2) / n_pairs)
