"""What is known of gates once they are made: how well they tell the experts' prompts apart, layer by layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class LayerReport:
    """The gates of one layer, on prompts; the last four are None where no prompts were read.

    `condition` is large where gates of two experts are nearly the same; of gates whose rows sum to zero, one direction
    is left out. `agreement` is the share of tokens whose first choice is the expert that their prompt belongs to,
    `weight` the mean weight that this expert gets after top-k, each expert counting the same; `entropy` that of the
    softmax over all experts, in nats; `load` [experts] the share of all tokens' weight that each expert gets.
    """

    layer: int
    condition: float
    agreement: float | None = None
    weight: float | None = None
    entropy: float | None = None
    load: tuple[float, ...] | None = None


@dataclass(frozen=True)
class GateReport:
    """How gates came out: `held_out` tells whether they were measured on other prompts than they were made from."""

    method: str
    experts: tuple[str, ...]
    temperature: float
    n_prompts: int
    n_tokens: int
    held_out: bool
    layers: tuple[LayerReport, ...]
    notices: tuple[str, ...] = ()

    @property
    def agreement(self) -> float | None:
        """Mean over layers of the share of tokens whose first choice is their prompt's expert."""
        found = [layer.agreement for layer in self.layers if layer.agreement is not None]
        return fmean(found) if found else None

    def as_json(self) -> dict[str, Any]:
        """Give the report for other programs."""
        return {**asdict(self), "agreement": self.agreement}


@dataclass(frozen=True, eq=False)
class GateFit:
    """Gates by the names of their tensors, each [experts, hidden] float32, and what is known of them."""

    gates: Mapping[str, NDArray[np.float32]]
    report: GateReport
