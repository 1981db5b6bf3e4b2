"""The gates of one layer from the states of prompts: plain functions of arrays, float64 inside.

States are [tokens, hidden], labels [tokens] the expert of each token's prompt, gates [experts, hidden]. An expert
without any token gets gates of zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mediator_cli.runtime.classify import unit_rows

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Ints = NDArray[np.integer]
    States = NDArray[np.floating]
    Make = Callable[[States, Ints, int], Floats]

_MOST_STEPS = 300


def random_gates(n_experts: int, n_hidden: int, seed: int, layer: int) -> Floats:
    """Draw from N(0, 1), as mergekit-moe does; each layer has numbers of its own."""
    return np.random.default_rng((seed, layer)).standard_normal((n_experts, n_hidden))


def uniform_gates(n_experts: int, n_hidden: int, seed: int, layer: int) -> Floats:
    """Draw evenly from -√(1/hidden) to √(1/hidden), as mergekit-moe and torch's linear layers do."""
    limit = n_hidden**-0.5
    return np.random.default_rng((seed, layer)).uniform(-limit, limit, (n_experts, n_hidden))


def prototype_gates(positive: Floats, negative: Floats) -> Floats:
    """Subtract the mean state of negative prompts from that of positive ones and scale each row to length 1."""
    return unit_rows(positive - negative)


def means_by_expert(states: States, labels: Ints, n_experts: int) -> Floats:
    """Mean state of each expert's tokens [experts, hidden]; NaN where it has none."""
    found = np.full((n_experts, states.shape[1]), np.nan)
    for expert in np.unique(labels):
        found[expert] = states[labels == expert].mean(axis=0, dtype=np.float64)
    return found


def centred_gates(states: States, labels: Ints, n_experts: int) -> Floats:
    """Mean state of each expert, less the mean over experts m, less what points along m: wₑ = P (mₑ - m).

    A gate has no bias, and states have a large mean in common. P = I - m mᵀ / mᵀm takes it out of all gates, so that
    the mean state makes all logits zero.
    """
    return _present(states, labels, n_experts, _centred)


def ridge_gates(states: States, labels: Ints, n_experts: int, strength: float) -> Floats:
    """Least squares without bias on targets 1 - 1/n for the token's expert and -1/n for the others, experts balanced.

    In closed form W = (M - m) (A + λ tr(A)/hidden I)⁻¹ / n with M the experts' mean states, m their mean, and A the
    second moment of states, each expert weighing the same. A is not centred: the direction of the common mean has its
    largest eigenvalue, so the inverse takes that direction out of the gates; and what little is left serves as bias.
    """
    return _present(states, labels, n_experts, lambda own, places, n: _ridge(own, places, n, strength))


def logistic_gates(states: States, labels: Ints, n_experts: int, strength: float) -> Floats:
    """Multinomial logistic regression without bias, experts balanced, penalty `strength` per token on ‖W‖²/2.

    Entries of a state are scaled to a root mean square of 1 for the penalty, and back.
    """
    return _present(states, labels, n_experts, lambda own, places, n: _logistic(own, places, n, strength))


def condition(gates: Floats, n_directions: int) -> float:
    """Divide the largest singular value of gates by the one that is number `n_directions`; infinite where it is 0.

    Large where the gates of two experts are nearly the same.
    """
    values = np.linalg.svd(gates, compute_uv=False)
    last = values[min(n_directions, len(values)) - 1] if n_directions else values[0]
    return float(values[0] / last) if last > 1e-9 * values[0] else float("inf")


def _present(states: States, labels: Ints, n_experts: int, make: Make) -> Floats:
    """Make the gates of the experts that have tokens, leaving the others zero."""
    experts, places = np.unique(labels, return_inverse=True)
    gates = np.zeros((n_experts, states.shape[1]))
    if len(experts) > 1:
        gates[experts] = make(states, places, len(experts))
    return gates


def _centred(states: States, labels: Ints, n_experts: int) -> Floats:
    means = means_by_expert(states, labels, n_experts)
    middle = means.mean(axis=0)
    gates = means - middle
    length = middle @ middle
    along: Floats = np.outer(gates @ middle / length, middle) if length > 0 else np.zeros_like(gates)
    found: Floats = gates - along
    return found


def _ridge(states: States, labels: Ints, n_experts: int, strength: float) -> Floats:
    n_hidden = states.shape[1]
    means = means_by_expert(states, labels, n_experts)
    moment = np.zeros((n_hidden, n_hidden))
    for expert in range(n_experts):
        own = states[labels == expert].astype(np.float64)
        moment += own.T @ own / (len(own) * n_experts)
    penalty = max(strength * np.trace(moment) / n_hidden, np.finfo(np.float64).tiny)
    targets = (means - means.mean(axis=0)) / n_experts
    gates: Floats = np.linalg.solve(moment + penalty * np.eye(n_hidden), targets.T).T
    return gates


def _logistic(states: States, labels: Ints, n_experts: int, strength: float) -> Floats:
    from sklearn.linear_model import LogisticRegression

    squares = np.square(states, dtype=np.float64).mean(axis=0)
    scale = np.sqrt(np.where(squares > 0, squares, 1.0))
    inverse = 1.0 / (strength * len(states))
    model = LogisticRegression(C=inverse, fit_intercept=False, class_weight="balanced", max_iter=_MOST_STEPS, tol=1e-3)
    found: Floats = model.fit(states / scale, labels).coef_
    # Of two experts scikit-learn gives one row, the log odds of the second.
    return (found if n_experts > 2 else np.vstack([-found, found]) / 2) / scale
