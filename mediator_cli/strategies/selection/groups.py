"""What selectors give: clusters of experts, or experts chosen one by one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mediator_cli.strategies.library import summed
from mediator_cli.strategies.strategy import Fitted

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from mediator_cli.strategies.library import Change

    Floats = NDArray[np.float64]

Kind = Literal["ensemble", "merge", "route"]
"""What the experts are chosen for: their mean probabilities, their mean change, or one of them for each task."""
KINDS: tuple[Kind, ...] = ("ensemble", "merge", "route")


@dataclass(frozen=True, eq=False)
class Grouped:
    """All experts in clusters, and how alike they are [experts, experts]."""

    clusters: Sequence[tuple[str, ...]]
    alike: Floats


@dataclass(frozen=True)
class Picked:
    """Experts in the order in which they were chosen, with repetitions where these are allowed."""

    names: tuple[str, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)


def merged_uniformly(changes: Sequence[Change]) -> Fitted:
    """Merge changes with equal weights."""
    return Fitted(folded=(summed([(change, 1 / len(changes)) for change in changes]),))
