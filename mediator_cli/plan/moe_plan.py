"""What a plan knows of the Mixture of Experts that it makes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mediator_cli.checkpoint.moe_layout import MoeFormat
    from mediator_cli.checkpoint.write import NewTensor
    from mediator_cli.recipe.moe import GateSpec, MoeSpec

BASE = "base"


@dataclass(frozen=True)
class ExpertPrompts:
    """What an expert is for and what it is not for, in the words of its prompts; none of either for some gates."""

    positive: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()


@dataclass(frozen=True)
class MoePlan:
    """The MoE: format, experts in the order of the gates' rows, their prompts, neurons of an expert.

    `inner` is the width of an expert, `layers` those that have experts: None before conflict is measured.
    `made` are the tensors that no source has: gates, and what a format wants beside them.
    """

    format: MoeFormat
    experts: tuple[str, ...]
    top_k: int
    inner: int
    spec: MoeSpec
    texts: Mapping[str, ExpertPrompts]
    layers: tuple[int, ...] | None = None
    made: tuple[NewTensor, ...] = ()

    @property
    def gates(self) -> GateSpec:
        """How the gates are made."""
        return self.spec.gates
