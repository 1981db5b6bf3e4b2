"""What a recipe may say of the router: what it reads, how it is fitted, and its policy."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mediator_cli.recipe.strict import Finite, Fraction, Strict

Features = Literal["embedding_mean", "hidden_mean", "text"]
PolicyRule = Literal["uncertainty", "argmax", "top_k", "posterior", "uniform", "fixed"]

POLICY_FIELDS: dict[str, tuple[str, ...]] = {
    "uncertainty": ("sure", "cover", "outside"),
    "argmax": ("outside",),
    "top_k": ("k", "outside"),
    "posterior": ("outside",),
    "uniform": (),
    "fixed": ("weights",),
}
"""The fields of `router.policy` that each rule takes."""


class PolicySpec(Strict):
    """How the router's probabilities become a mixture."""

    rule: Annotated[
        PolicyRule,
        Field(
            description="uncertainty: the most probable expert alone where the router is sure, else the fewest experts "
            "that cover enough probability. argmax: the most probable one. top_k: the k most probable. "
            "posterior: all by their probability. uniform: all alike. fixed: the weights given."
        ),
    ] = "uncertainty"
    sure: Annotated[
        float, Field(ge=0, le=1, description="Normalised entropy up to which the most probable expert answers alone.")
    ] = 0.1
    cover: Annotated[Fraction, Field(description="Probability that a mixed set of experts has to cover.")] = 0.9
    k: Annotated[int | None, Field(ge=1, description="Number of experts, for rule `top_k`.")] = None
    weights: Annotated[
        dict[str, Finite] | None, Field(description="Weight of each expert, for rule `fixed`; others get 0.")
    ] = None
    outside: Annotated[
        Literal["dense", "ignore"],
        Field(description="What answers an input unlike all tasks: the dense expert, or whatever the rule says."),
    ] = "dense"

    @model_validator(mode="after")
    def _fields_fit_rule(self) -> PolicySpec:
        allowed = POLICY_FIELDS[self.rule]
        if extra := sorted(self.model_fields_set - {"rule", *allowed}):
            raise ValueError(f"rule '{self.rule}' takes no {', '.join(extra)}")
        for name in ("k", "weights"):
            if name in allowed and getattr(self, name) is None:
                raise ValueError(f"rule '{self.rule}' needs {name}")
        return self


class RouterSpec(Strict):
    """What decides at run time which experts answer a prompt; fitted on the experts' prompts."""

    features: Annotated[
        Features,
        Field(
            description="What it reads. embedding_mean: the prompt's mean input embedding, which needs no pass of the "
            "model. hidden_mean: the mean hidden state after the first layers. text: words and runs of characters."
        ),
    ] = "embedding_mean"
    layer: Annotated[
        int | None, Field(ge=1, description="Decoder layers that run before the mean, for features `hidden_mean`.")
    ] = None
    classifier: Annotated[
        Literal["logistic", "gaussian", "prototype", "ridge"],
        Field(
            description="logistic: logistic regression. gaussian: linear discriminant with a shrunk covariance. "
            "prototype: cosine to each task's mean. ridge: ridge regression in closed form."
        ),
    ] = "logistic"
    calibrate: Annotated[
        Literal["temperature", "none"], Field(description="Whether held-out prompts set the temperature.")
    ] = "temperature"
    held_out: Annotated[
        float, Field(gt=0, lt=1, description="Share of each expert's prompts that calibrate and measure the router.")
    ] = 0.2
    max_prompts: Annotated[int, Field(ge=8, description="Most prompts of one expert that are used.")] = 1000
    outside_quantile: Annotated[
        Fraction, Field(description="Quantile of held-out prompts' scores above which an input is unlike all tasks.")
    ] = 0.99
    policy: PolicySpec = PolicySpec()

    @model_validator(mode="after")
    def _layer_fits_features(self) -> RouterSpec:
        if self.features == "hidden_mean" and self.layer is None:
            raise ValueError("features 'hidden_mean' needs layer")
        if self.features != "hidden_mean" and self.layer is not None:
            raise ValueError(f"features '{self.features}' takes no layer")
        return self
