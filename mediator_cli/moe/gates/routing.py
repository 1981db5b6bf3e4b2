"""What gates choose: first choices, weights and entropy of tokens, and their means over tasks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mediator_cli.runtime.calibrate import softmax

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Ints = NDArray[np.integer]


@dataclass(frozen=True)
class Choices:
    """What a layer's gates choose on tokens of several groups, such as tasks.

    first [groups, experts]: share of tokens that get an expert as their first choice; weight [groups, experts]: mean
    weight after top-k, which sums to 1; entropy [groups]: mean entropy of the softmax over all experts, in nats.
    """

    first: Floats
    weight: Floats
    entropy: Floats


def top_weights(logits: Floats, top_k: int) -> Floats:
    """Softmax over the largest `top_k` logits of each token [tokens, experts], zero elsewhere; the first of equals.

    Where a config does not renormalise (norm_topk_prob false), weights are smaller by one factor for each token.
    """
    order = np.argsort(-logits, axis=1, kind="stable")
    kept = np.full_like(logits, -np.inf)
    best = order[:, :top_k]
    np.put_along_axis(kept, best, np.take_along_axis(logits, best, axis=1), axis=1)
    return softmax(kept)


def choices(logits: Floats, groups: Ints, n_groups: int, top_k: int) -> Choices:
    """Sum up logits [tokens, experts] by the group [tokens] of each token; NaN for a group without tokens."""
    n_experts = logits.shape[1]
    first = np.eye(n_experts)[logits.argmax(axis=1)]
    probabilities = softmax(logits)
    logs = np.log(np.maximum(probabilities, np.finfo(np.float64).tiny))
    entropy = -(probabilities * logs).sum(axis=1, keepdims=True)
    found = [_means(values, groups, n_groups) for values in (first, top_weights(logits, top_k), entropy)]
    return Choices(found[0], found[1], found[2][:, 0])


def _means(values: Floats, groups: Ints, n_groups: int) -> Floats:
    counts = np.bincount(groups, minlength=n_groups)[:, None]
    sums = np.zeros((n_groups, values.shape[1]))
    np.add.at(sums, groups, values)
    with np.errstate(invalid="ignore"):
        means: Floats = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    return means
