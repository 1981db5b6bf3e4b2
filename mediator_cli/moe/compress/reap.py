"""REAP: drop the experts that add least to what their layer says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mediator_cli.moe.compress.groups import Group, most_important

if TYPE_CHECKING:
    from mediator_cli.moe.compress.statistics import LayerStatistics


def reap(found: LayerStatistics, n: int) -> tuple[Group, ...]:
    """Keep the n experts of highest saliency; the others go, and their rows of the gates with them.

    S_j = mean over the tokens that get expert j of g_j(x) · ‖E_j(x)‖₂, where g is the weight that the layer gives, so
    renormalised where the model does that; an expert that no token gets has S_j = 0.
    Router-weighted Expert Activation Pruning, arXiv 2510.13999. All of it is here.
    """
    return tuple(Group((expert,), (1.0,)) for expert in sorted(most_important(found.saliency, n)))
