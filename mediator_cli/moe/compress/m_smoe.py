"""M-SMoE: the most used experts take in those that the router treats alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mediator_cli.moe.compress.groups import Group, cosines, make_groups, most_important

if TYPE_CHECKING:
    from mediator_cli.moe.compress.statistics import LayerStatistics


def m_smoe(found: LayerStatistics, n: int) -> tuple[Group, ...]:
    """Group experts around the n most used ones of the layer.

    Every other expert joins the dominant one of the highest (cos + 1) / 2 between their columns of router logits over
    all tokens. W = Σ f_i W_i / Σ f_i with the usage frequency f, after the inner neurons of each member were put in
    the order that maximises ⟨W_in^ref, P W_in⟩ + ⟨W_out^ref, W_out Pᵀ⟩ (`align.by_weights`).
    M-SMoE of arXiv 2310.01334. Left out: dominant experts are chosen over the whole model there, so that layers keep
    different numbers, which no format can say; here each layer keeps n. The reference of the alignment is the group's
    dominant expert, not expert 0. No distillation afterwards, and no low-rank part (MC-SMoE).
    """
    alike = cosines(found.logit_products)
    dominant = most_important(found.frequency, n)
    groups = {expert: [expert] for expert in dominant}
    for expert in range(found.n_experts):
        if expert not in groups:
            groups[max(dominant, key=lambda each: alike[expert, each])].append(expert)
    return make_groups(groups.values(), found.frequency)
