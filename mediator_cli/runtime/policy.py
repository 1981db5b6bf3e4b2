"""From probabilities to mixtures: how sure the router has to be, and which experts answer when it is not. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from mediator_cli.bundle.router_record import PolicyRecord

    Floats = NDArray[np.float64]

_ROUNDING = 1e-9
"""A set that misses `cover` by less than this covers it: 0.7 + 0.2 is not quite 0.9 in binary."""
BLIND_RULES = ("uniform", "fixed")
"""Rules that give the same mixture to every input."""


def entropy(probabilities: Floats) -> Floats:
    """Uncertainty of each row of probabilities [rows, experts], as a share of the largest possible one [rows].

    0 when one expert has all the probability, 1 when all have the same; 0 for a single expert.

    >>> entropy(np.array([[1.0, 0.0], [0.5, 0.5]])).tolist()
    [0.0, 1.0]
    """
    n_experts = probabilities.shape[1]
    if n_experts == 1:
        return np.zeros(len(probabilities))
    logs = np.log(probabilities, out=np.zeros(probabilities.shape), where=probabilities > 0)
    shares: Floats = (probabilities * -logs).sum(axis=1) / np.log(n_experts)
    return np.clip(shares, 0.0, 1.0)


def mix(
    probabilities: Floats, outside: NDArray[np.bool_], policy: PolicyRecord, experts: Sequence[str]
) -> NDArray[np.float32]:
    """Give the mixture of each row of probabilities [rows, experts]; `outside` [rows] marks inputs unlike all tasks.

    Returns weights [rows, experts] that sum to 1, but for rule fixed, whose weights stand as they were given.
    A row of zeros is the dense expert alone; only `outside` rows of rules that read the input can be such a row.
    """
    weights = _apply_rule(probabilities, policy, experts)
    if policy.outside != "ignore" and policy.rule not in BLIND_RULES:
        answers = 0.0 if policy.outside == "dense" else 1 / weights.shape[1]
        weights = np.where(outside[:, None], answers, weights)
    return weights.astype(np.float32)


def _apply_rule(probabilities: Floats, policy: PolicyRecord, experts: Sequence[str]) -> Floats:
    n_rows, n_experts = probabilities.shape
    match policy.rule:
        case "uncertainty":
            return _by_uncertainty(probabilities, policy.sure, policy.cover)
        case "argmax":
            return _most_probable(probabilities, 1)
        case "top_k":
            return _most_probable(probabilities, policy.k or 1)
        case "posterior":
            return probabilities
        case "uniform":
            return np.full((n_rows, n_experts), 1 / n_experts)
        case "fixed":
            given = policy.weights or {}
            return np.tile([given.get(expert, 0.0) for expert in experts], (n_rows, 1))


def _by_uncertainty(probabilities: Floats, sure: float, cover: float) -> Floats:
    """One expert where the entropy is at most `sure`, else the smallest set that holds `cover` of the probability."""
    is_sure = entropy(probabilities) <= sure
    return np.where(is_sure[:, None], _most_probable(probabilities, 1), _smallest_cover(probabilities, cover))


def _most_probable(probabilities: Floats, k: int) -> Floats:
    return _renormalised(probabilities, _ranks(probabilities) < k)


def _smallest_cover(probabilities: Floats, cover: float) -> Floats:
    order = _descending(probabilities)
    falling = np.take_along_axis(probabilities, order, axis=1)
    covered_before = np.cumsum(falling, axis=1) - falling
    wanted = covered_before < cover - _ROUNDING
    wanted[:, 0] = True
    kept = np.empty_like(wanted)
    np.put_along_axis(kept, order, wanted, axis=1)
    return _renormalised(probabilities, kept)


def _descending(probabilities: Floats) -> NDArray[np.intp]:
    """Order experts by falling probability [rows, experts]; of equal ones the earlier expert comes first."""
    return np.argsort(-probabilities, axis=1, kind="stable")


def _ranks(probabilities: Floats) -> NDArray[np.intp]:
    return np.argsort(_descending(probabilities), axis=1, kind="stable")


def _renormalised(probabilities: Floats, kept: NDArray[np.bool_]) -> Floats:
    """Share the whole mixture among the kept experts; each row keeps its most probable one, so no sum is zero."""
    chosen = np.where(kept, probabilities, 0.0)
    shares: Floats = chosen / chosen.sum(axis=1, keepdims=True)
    return shares
