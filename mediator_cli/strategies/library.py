"""A library of adapters of one base, in memory and low-rank, and what is derived from it: subsets, merges, clusters."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from mediator_cli.bundle.factors import FactorDelta

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

Change = dict[str, FactorDelta]
"""What one expert adds to the base, by tensor name."""


@dataclass(frozen=True, eq=False)
class Library:
    """Experts of one base, by name, each with what it adds to tensors; `base` is the base's folder.

    `shapes` are those of every matrix [out, in] that some expert changes. `scalings` are the numbers, by expert and
    tensor, that b has been multiplied by, where they are known and not 1: some methods weigh A and B by their roots.
    """

    base: Path
    experts: Mapping[str, Change]
    shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    scalings: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Name the experts in their order."""
        return tuple(self.experts)

    @property
    def n_bytes(self) -> int:
        """Count the bytes of all factors as they are held, in float32."""
        return sum(count_bytes(change) for change in self.experts.values())

    def subset(self, names: Sequence[str]) -> Library:
        """Keep these experts alone, in this order."""
        return replace(self, experts={name: self.experts[name] for name in names})


def count_bytes(change: Change) -> int:
    """Count the bytes of an expert's factors in float32."""
    return sum(delta.a.nbytes + delta.b.nbytes for delta in change.values())


def scaled(change: Change, weight: float) -> Change:
    """Multiply what an expert adds."""
    return {name: FactorDelta(delta.a, delta.b * weight) for name, delta in change.items()}


def summed(parts: Sequence[tuple[Change, float | Mapping[str, float]]]) -> Change:
    """Add Σ weight · b · a without cross terms: factors beside each other, so the rank is the sum of the ranks.

    A weight is one number, or one for each tensor.
    """
    found: dict[str, list[FactorDelta]] = {}
    for change, weight in parts:
        for name, delta in change.items():
            own = weight if isinstance(weight, int | float) else weight[name]
            if own:
                found.setdefault(name, []).append(FactorDelta(delta.a, delta.b * own))
    return {name: _beside(deltas) for name, deltas in found.items()}


def _beside(deltas: Sequence[FactorDelta]) -> FactorDelta:
    return FactorDelta(torch.cat([d.a for d in deltas]), torch.cat([d.b for d in deltas], dim=1))
