"""Hidden units: what may change places in a model without changing what it computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mediator_cli.recipe.align import AlignGroup, AlignSpec


HEAD_NORMS = {"q_norm": "q_proj", "k_norm": "k_proj", "q_layernorm": "q_proj", "k_layernorm": "k_proj"}
"""Norms of queries and keys, with the matrices whose rows they go with."""


class UnknownUnitsError(Exception):
    """Says, by name, what stands in the way of knowing the units of a model."""


@dataclass(frozen=True, slots=True)
class Side:
    """One axis of a tensor, along which units lie: `width` entries for each `share` units in a row."""

    tensor: str
    axis: int
    width: int = 1
    share: int = 1


@dataclass(frozen=True)
class Units:
    """So many units that one permutation moves, and all that goes with them.

    Each `per_group` in a row stay together: groups may change places, and units inside their group.
    """

    name: str
    group: AlignGroup
    size: int
    sides: tuple[Side, ...]
    per_group: int = 1


@dataclass(frozen=True)
class AlignPlan:
    """What is aligned: the units of the base, the source whose order they get, those that get it, by name."""

    spec: AlignSpec
    units: tuple[Units, ...]
    target: str
    moving: tuple[str, ...]
    seed: int
    notices: tuple[str, ...] = ()
