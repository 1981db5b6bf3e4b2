"""Twin-Merging: one shared expert, and what each expert has beyond it, weighed by a router of the prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from mediator_cli.bundle.router_record import PolicyRecord
from mediator_cli.runtime.features import FeatureSpec
from mediator_cli.runtime.fit import FitSettings
from mediator_cli.strategies._own_rows import SourceParameter, rows_by_expert
from mediator_cli.strategies._prompt_router import fit_on_prompts
from mediator_cli.strategies._svd import cut
from mediator_cli.strategies.library import scaled, summed
from mediator_cli.strategies.route_prompt import Kind, MaxPrompts
from mediator_cli.strategies.strategy import Fitted, strategy

if TYPE_CHECKING:
    from mediator_cli.strategies.bench import Bench
    from mediator_cli.strategies.library import Change

Scale = Annotated[
    float | None, Field(gt=0, description="Weight of each expert in the shared one; null: one by their number.")
]
Rank = Annotated[int, Field(ge=1, description="Singular values kept of what an expert has beyond the shared one.")]
Layer = Annotated[int | None, Field(ge=1, description="Decoder layers before the router's mean; null: all.")]


@strategy(group="route", reference="https://arxiv.org/abs/2406.15479", needs=("rows", "tasks"))
def route_twin_merging(
    bench: Bench,
    *,
    scale: Scale = None,
    rank: Rank = 16,
    layer: Layer = None,
    classifier: Kind = "logistic",
    source: SourceParameter = "both",
    max_prompts: MaxPrompts = 60,
) -> Fitted:
    """Answer by θ* + Σ wₜvₜ: θ* = W + λΣτₜ, vₜ = τₜ - λΣτ cut to a rank, w the router's probabilities.

    The router reads mean hidden states of θ*, as in the paper; it is a linear classifier, not an MLP of three layers.
    """
    library = bench.library
    shared = summed([(change, scale or 1 / len(library.experts)) for change in library.experts.values()])
    own = {name: _beyond(change, shared, rank) for name, change in library.experts.items()}
    spec = FeatureSpec("hidden_mean", layer or int(bench.model.config.get_text_config().num_hidden_layers))
    settings = FitSettings(
        features=spec,
        classifier=classifier,
        policy=PolicyRecord(rule="posterior", outside="ignore"),
        max_prompts=max_prompts,
    )
    twin = Fitted(experts=own, folded=(shared,))
    router, facts = fit_on_prompts(bench, twin, rows_by_expert(bench, source), settings)
    return Fitted(experts=own, folded=(shared,), decision=router, facts=facts)


def _beyond(change: Change, shared: Change, rank: int) -> Change:
    left = summed([(change, 1.0), (scaled(shared, -1.0), 1.0)])
    return {name: cut(delta, rank) for name, delta in left.items()}
