"""What a recipe may say of the router: what it reads, how it is fitted, and its policy."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mediator_cli.recipe.strict import Finite, Fraction, Strict

Features = Literal["embedding_mean", "hidden_mean", "text", "perplexity", "gradient"]
ASKING: tuple[Features, ...] = ("perplexity", "gradient")
"""Features that ask the experts themselves, and so need neither prompts nor a fit."""
MOST_ASKED = 80
"""Prompts of one expert that are used where each costs a pass of every expert."""
PolicyRule = Literal["uncertainty", "argmax", "top_k", "posterior", "uniform", "fixed"]

POLICY_FIELDS: dict[str, tuple[str, ...]] = {
    "uncertainty": ("sure", "cover", "outside", "combine"),
    "argmax": ("outside", "combine"),
    "top_k": ("k", "outside", "combine"),
    "posterior": ("outside", "combine"),
    "uniform": ("combine",),
    "fixed": ("weights", "combine"),
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
    combine: Annotated[
        Literal["parameters", "probabilities", "logits", "hidden"],
        Field(
            description="How several experts answer one input. parameters: as one model, mixed of them. The others run "
            "each expert apart and average, for every token, its probabilities, its logits, or its last hidden state."
        ),
    ] = "parameters"

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
    """What decides at run time which experts answer a prompt; fitted on the experts' prompts, or asking the experts."""

    features: Annotated[
        Features,
        Field(
            description="What it reads. embedding_mean: the prompt's mean input embedding, which needs no pass of the "
            "model. hidden_mean: the mean hidden state after the first layers. text: words and runs of characters. "
            "perplexity: how well each expert predicts the prompt. gradient: the cosine of each expert's delta with "
            "the step that would make the dense expert predict it better. These two need no prompts."
        ),
    ] = "embedding_mean"
    layer: Annotated[
        int | None, Field(ge=1, description="Decoder layers that run before the mean, for features `hidden_mean`.")
    ] = None
    reads: Annotated[
        Literal["turn", "prompt"],
        Field(
            description="For perplexity and gradient. turn: the text of the last user turn alone. prompt: all tokens "
            "that the model gets, chat template included."
        ),
    ] = "turn"
    first_token: Annotated[
        Literal["skip", "bos"],
        Field(
            description="For perplexity and gradient. skip: the first token is not predicted. bos: the tokenizer's "
            "beginning-of-text token stands before it, and it counts."
        ),
    ] = "skip"
    form: Annotated[
        Literal["inverse", "posterior"] | None,
        Field(
            description="For perplexity without classifier: the score that softmax makes shares of. inverse "
            "(default, as MergeME): 1 / perplexity. posterior: the log-probability of the whole prompt."
        ),
    ] = None
    temperature: Annotated[
        Finite | None,
        Field(gt=0, description="Divides the scores, without classifier. Default: perplexity 1, gradient 0.001."),
    ] = None
    classifier: Annotated[
        Literal["logistic", "gaussian", "prototype", "ridge", "none"],
        Field(
            description="logistic: logistic regression. gaussian: linear discriminant with a shrunk covariance. "
            "prototype: cosine to each task's mean. ridge: ridge regression in closed form. none: softmax of what the "
            "experts say; for perplexity and gradient, where it is the default."
        ),
    ] = "logistic"
    calibrate: Annotated[
        Literal["temperature", "none"],
        Field(description="Whether held-out prompts set the temperature. Default without classifier: none."),
    ] = "temperature"
    held_out: Annotated[
        float, Field(gt=0, lt=1, description="Share of each expert's prompts that calibrate and measure the router.")
    ] = 0.2
    max_prompts: Annotated[
        int, Field(ge=8, description="Most prompts of one expert that are used. Default where experts are asked: 80.")
    ] = 1000
    outside_quantile: Annotated[
        Fraction, Field(description="Quantile of held-out prompts' scores above which an input is unlike all tasks.")
    ] = 0.99
    policy: PolicySpec = PolicySpec()

    @model_validator(mode="before")
    @classmethod
    def _choose_for_asking(cls, data: Any) -> Any:  # noqa: ANN401 - whatever the recipe holds
        """Give routers that ask the experts defaults of their own: no classifier, and then the two best experts."""
        if not isinstance(data, dict) or data.get("features") not in ASKING:
            return data
        chosen = {"classifier": "none", "max_prompts": MOST_ASKED, **data}
        if chosen["classifier"] != "none":
            return chosen
        policy = chosen.get("policy", {})
        if isinstance(policy, dict) and "rule" not in policy:
            chosen["policy"] = {"k": 2, **policy, "rule": "top_k"}
        return {"calibrate": "none", **chosen}

    @property
    def asks(self) -> bool:
        """Whether the experts themselves are asked about a prompt."""
        return self.features in ASKING

    @model_validator(mode="after")
    def _fields_fit_asking(self) -> RouterSpec:
        if not self.asks:
            extra = [name for name in ("reads", "first_token") if name in self.model_fields_set]
            if extra:
                raise ValueError(f"features '{self.features}' takes no {extra[0]}")
            if self.classifier == "none":
                raise ValueError(f"features '{self.features}' needs a classifier")
        if self.form is not None and (self.features != "perplexity" or self.classifier != "none"):
            raise ValueError("`form` is for features 'perplexity' without classifier")
        if self.temperature is not None and self.classifier != "none":
            raise ValueError("`temperature` is for classifier 'none'; that of the others is fitted")
        if self.temperature is not None and self.calibrate == "temperature":
            raise ValueError("give a temperature, or let held-out prompts set it")
        return self

    @model_validator(mode="after")
    def _layer_fits_features(self) -> RouterSpec:
        if self.features == "hidden_mean" and self.layer is None:
            raise ValueError("features 'hidden_mean' needs layer")
        if self.features != "hidden_mean" and self.layer is not None:
            raise ValueError(f"features '{self.features}' takes no layer")
        return self
