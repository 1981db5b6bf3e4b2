"""Which units are routed and which averaged, from their scores. No torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mediator_cli.recipe.schema import AssignSpec

Decision = Literal["average", "route"]
_TOLERANCE = 1e-12
"""Scores that differ by less are equal, so that rounding in a mean routes nothing."""


def assign_units(
    spec: AssignSpec,
    units: Sequence[str],
    candidates: Sequence[str],
    listed: Sequence[str],
    scores: Mapping[str, float],
) -> dict[str, Decision]:
    """Decide for each unit; `scores` holds the conflict of each candidate where the rule needs it."""
    fixed = {"none": (), "all": candidates, "listed": listed}
    routed = fixed[spec.rule] if spec.rule in fixed else _by_score(spec, candidates, scores)
    return {unit: "route" if unit in routed else "average" for unit in units}


def _by_score(spec: AssignSpec, candidates: Sequence[str], scores: Mapping[str, float]) -> Sequence[str]:
    if spec.rule == "top_k":
        return sorted(candidates, key=lambda unit: -scores[unit])[: spec.k]
    limit = spec.threshold or 0.0
    if spec.rule == "mean_std":
        limit = mean_plus_std([scores[unit] for unit in candidates], spec.std or 0.0)
    return [unit for unit in candidates if scores[unit] > limit + _TOLERANCE]


def mean_plus_std(scores: Sequence[float], n_std: float) -> float:
    """Return mean + n_std · population standard deviation; 0 of nothing.

    >>> mean_plus_std([0.2, 0.4], 1.0)
    0.4
    """
    if not scores:
        return 0.0
    mean = math.fsum(scores) / len(scores)
    variance = math.fsum((score - mean) ** 2 for score in scores) / len(scores)
    return mean + n_std * math.sqrt(variance)
