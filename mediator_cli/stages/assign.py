"""Which units are routed and which averaged, from their scores. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from mediator_cli.recipe.sizes import parse_size

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mediator_cli.recipe.schema import AssignSpec

Decision = Literal["average", "route"]
_TOLERANCE = 1e-12
"""Scores that differ by less are equal, so that rounding in a mean routes nothing."""


@dataclass(frozen=True)
class SparseSizes:
    """Bytes that the sparse experts can take, all together: by unit, and what the files take beside their units."""

    units: Mapping[str, int] = field(default_factory=dict)
    files: int = 0


def assign_units(
    spec: AssignSpec,
    units: Sequence[str],
    candidates: Sequence[str],
    listed: Sequence[str],
    scores: Mapping[str, float],
    sizes: SparseSizes | None = None,
) -> dict[str, Decision]:
    """Decide for each unit; `scores` and `sizes` are of each candidate, where the rule needs them."""
    fixed: dict[str, Sequence[str]] = {"none": (), "all": candidates, "listed": listed}
    routed: Sequence[str]
    if spec.rule == "byte_budget":
        routed = _within(parse_size(spec.bytes or 0), _from_highest(candidates, scores), sizes or SparseSizes())
    else:
        routed = fixed[spec.rule] if spec.rule in fixed else _by_score(spec, candidates, scores)
    return {unit: "route" if unit in routed else "average" for unit in units}


def _by_score(spec: AssignSpec, candidates: Sequence[str], scores: Mapping[str, float]) -> Sequence[str]:
    if spec.rule == "top_k":
        return _from_highest(candidates, scores)[: spec.k]
    limit = score_limit(spec, candidates, scores) or 0.0
    return [unit for unit in candidates if scores[unit] > limit + _TOLERANCE]


def score_limit(spec: AssignSpec, candidates: Sequence[str], scores: Mapping[str, float]) -> float | None:
    """Return the score above which a unit is routed; None for a rule that has no such limit."""
    if spec.rule == "mean_std":
        return mean_plus_std([scores[unit] for unit in candidates], spec.std or 0.0)
    return spec.threshold if spec.rule == "threshold" else None


def _from_highest(candidates: Sequence[str], scores: Mapping[str, float]) -> list[str]:
    return sorted(candidates, key=lambda unit: -scores[unit])


def _within(n_bytes: int, units: Sequence[str], sizes: SparseSizes) -> list[str]:
    """Go through the units in order and take each one that still fits."""
    chosen: list[str] = []
    left = n_bytes - sizes.files
    for unit in units:
        if sizes.units[unit] <= left:
            chosen.append(unit)
            left -= sizes.units[unit]
    return chosen


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
