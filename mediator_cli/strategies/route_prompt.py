"""A router reads the prompt, and one expert or a mixture of a few answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from mediator_cli.bundle.router_record import PolicyRecord
from mediator_cli.errors import Problem, RecipeError
from mediator_cli.runtime.features import FeatureSpec
from mediator_cli.runtime.fit import FitSettings
from mediator_cli.strategies._own_rows import SourceParameter, rows_by_expert
from mediator_cli.strategies._prompt_router import fit_on_prompts
from mediator_cli.strategies.strategy import Fitted, strategy

if TYPE_CHECKING:
    from mediator_cli.strategies.bench import Bench

Features = Annotated[
    Literal["embedding_mean", "hidden_mean", "text", "perplexity"],
    Field(description="What the router reads of a prompt; perplexity asks all experts."),
]
Layer = Annotated[int | None, Field(ge=1, description="hidden_mean: decoder layers that run first; half by default.")]
Kind = Annotated[Literal["logistic", "gaussian", "prototype", "ridge"], Field(description="Kind of classifier.")]
MaxPrompts = Annotated[
    int, Field(ge=8, description="Most prompts of one expert, chosen by the digests of their texts.")
]
Rule = Annotated[
    Literal["uncertainty", "argmax", "posterior", "top_k"],
    Field(description="How probabilities become a mixture: one expert where the router is sure, always one, or all."),
]
Sure = Annotated[float, Field(ge=0, le=1, description="uncertainty: entropy up to which one expert answers alone.")]
Cover = Annotated[float, Field(gt=0, le=1, description="uncertainty: probability that the mixed experts must cover.")]
TopK = Annotated[int, Field(ge=1, description="Number of experts of rule top_k.")]
Outside = Annotated[
    Literal["dense", "uniform", "ignore"],
    Field(description="What answers a prompt unlike all tasks: the base, all experts alike, or as the rule says."),
]


@strategy(group="route", reference="https://arxiv.org/abs/2405.11157", needs=("rows", "tasks"))
def route_prompt(
    bench: Bench,
    *,
    features: Features = "embedding_mean",
    layer: Layer = None,
    classifier: Kind = "logistic",
    rule: Rule = "uncertainty",
    sure: Sure = 0.1,
    cover: Cover = 0.9,
    top_k: TopK = 2,
    outside: Outside = "dense",
    source: SourceParameter = "both",
    max_prompts: MaxPrompts = 200,
) -> Fitted:
    """Classify the prompt by task once; W + Σ wₜ bₜaₜ answers, w from the probabilities of the tasks.

    Reads prompts alone, those to train on too where they are given: wordings that it never saw are unlike all tasks.
    Needs 8 different prompts of each expert. Raises BundleError where there are fewer, or tasks share their prompts,
    RecipeError for a layer that nothing reads.
    """
    if features != "hidden_mean" and layer is not None:
        raise RecipeError(Problem("layer", f"features {features} have no layer", "leave it out, or read hidden_mean"))
    if features == "hidden_mean" and layer is None:
        layer = max(1, int(bench.model.config.get_text_config().num_hidden_layers) // 2)
    policy = PolicyRecord(rule=rule, sure=sure, cover=cover, k=top_k if rule == "top_k" else None, outside=outside)
    spec = FeatureSpec(features, layer)
    settings = FitSettings(features=spec, classifier=classifier, policy=policy, max_prompts=max_prompts)
    fitted = Fitted(experts=bench.library.experts)
    router, facts = fit_on_prompts(bench, fitted, rows_by_expert(bench, source), settings)
    return Fitted(experts=bench.library.experts, decision=router, facts=facts)
