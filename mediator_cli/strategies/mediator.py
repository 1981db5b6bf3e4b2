"""The Mediator's own way on adapters: experts beside their mean, chosen by how sure a router of prompts is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mediator_cli.strategies._own_rows import SourceParameter
from mediator_cli.strategies.route_prompt import Cover, Features, Kind, Layer, MaxPrompts, Sure, route_prompt
from mediator_cli.strategies.strategy import Fitted, strategy

if TYPE_CHECKING:
    from mediator_cli.strategies.bench import Bench


@strategy(group="route", reference="https://arxiv.org/abs/2502.04411", needs=("rows", "tasks"))
def mediator(
    bench: Bench,
    *,
    features: Features = "embedding_mean",
    layer: Layer = None,
    classifier: Kind = "logistic",
    sure: Sure = 0.1,
    cover: Cover = 0.9,
    source: SourceParameter = "both",
    max_prompts: MaxPrompts = 200,
) -> Fitted:
    """Answer by one expert where the router is sure, by the smallest likely set where not, by the mean where lost.

    Of a bundle with dense part D = W + mean and experts τₜ - mean, a mixture w with Σw = 1 is W + Σ wₜτₜ, and no
    expert at all is W + Στₜ/T. Here the same is computed of W and the τₜ as they are, which stay of low rank: a prompt
    unlike all tasks gets all experts alike. All matrices are routed; a merge may average those with little conflict.
    """
    return route_prompt.fit(
        bench, features=features, layer=layer, classifier=classifier, rule="uncertainty", sure=sure, cover=cover,
        outside="uniform", source=source, max_prompts=max_prompts,
    )  # fmt: skip
