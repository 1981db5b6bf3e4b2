"""What the manifest says of a router. Neither torch nor numpy here."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, FiniteFloat, model_validator

from mediator_cli.bundle.record import FileRecord, Record


class PolicyRecord(Record):
    """How the router's probabilities become a mixture."""

    rule: Literal["uncertainty", "argmax", "top_k", "posterior", "uniform", "fixed"] = "uncertainty"
    sure: Annotated[
        float, Field(ge=0, le=1, description="Normalised entropy up to which the most probable expert answers alone.")
    ] = 0.1
    cover: Annotated[float, Field(gt=0, le=1, description="Probability that a mixed set of experts has to cover.")] = (
        0.9
    )
    k: Annotated[int | None, Field(ge=1, description="Number of experts of rule top_k.")] = None
    weights: Annotated[dict[str, FiniteFloat] | None, Field(description="Weights of rule fixed, by expert.")] = None
    outside: Annotated[
        Literal["dense", "uniform", "ignore"],
        Field(
            description="What answers an input unlike all tasks: the dense expert, all experts alike, or whatever the "
            "rule says."
        ),
    ] = "dense"
    combine: Annotated[
        Literal["parameters", "probabilities", "logits", "hidden"],
        Field(description="How several experts answer: mixed into one model, or apart and their outputs averaged."),
    ] = "parameters"

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        missing = {"top_k": ("k", self.k), "fixed": ("weights", self.weights)}.get(self.rule)
        if missing and missing[1] is None:
            raise ValueError(f"rule {self.rule} needs {missing[0]}")
        return self


class RouterReport(Record):
    """How well a router tells prompts apart that it was not fitted on; `confusion` counts true expert by chosen."""

    n_fitted: int
    n_held_out: int
    accuracy: float
    log_loss: float
    calibration_error: Annotated[float, Field(description="Expected calibration error over 15 bins.")]
    confusion: tuple[tuple[int, ...], ...]


class RouterRecord(Record):
    """The router: what it reads, how it decides, and its file."""

    features: Annotated[
        Literal["embedding_mean", "hidden_mean", "text", "perplexity", "gradient", "none"],
        Field(description="What it reads of a prompt; none: nothing, for policies that give all inputs one mixture."),
    ]
    layer: Annotated[int | None, Field(ge=1, description="hidden_mean: decoder layers that run before the mean.")] = (
        None
    )
    reads: Annotated[Literal["turn", "prompt"], Field(description="Tokens that perplexity and gradient are of.")] = (
        "turn"
    )
    first_token: Annotated[
        Literal["skip", "bos"], Field(description="Whether the first of them is predicted, from a token before it.")
    ] = "skip"
    form: Annotated[
        Literal["inverse", "posterior"] | None, Field(description="Scores of perplexity with classifier none.")
    ] = None
    classifier: Literal["logistic", "gaussian", "prototype", "ridge", "none"]
    experts: Annotated[
        tuple[str, ...], Field(min_length=1, description="Experts in the order of the router's outputs.")
    ]
    size: Annotated[int, Field(ge=1, description="Number of features.")]
    temperature: Annotated[FiniteFloat, Field(gt=0)]
    outside_above: Annotated[
        FiniteFloat | None,
        Field(description="Score above which an input counts as unlike all tasks; null: not known, none does."),
    ]
    policy: PolicyRecord
    report: Annotated[RouterReport | None, Field(description="Null where it was measured on no prompts.")]
    file: Annotated[FileRecord | None, Field(description="Null with classifier none, which has no arrays.")]

    @property
    def asks(self) -> bool:
        """Whether the experts themselves are asked about a prompt."""
        return self.features in ("perplexity", "gradient")

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        is_fitted = self.classifier != "none"
        if self.features == "none" and (is_fitted or self.policy.rule not in ("uniform", "fixed")):
            raise ValueError("features none go with classifier none and a policy that reads no input")
        if not is_fitted and not self.asks and self.features != "none":
            raise ValueError(f"features {self.features} need a classifier")
        if is_fitted and None in (self.outside_above, self.file):
            raise ValueError("a fitted router has outside_above and file")
        if not is_fitted and self.file is not None:
            raise ValueError("classifier none has no file")
        if (self.form is not None) != (self.features == "perplexity" and not is_fitted):
            raise ValueError("form goes with perplexity and classifier none")
        return self

    @model_validator(mode="after")
    def _names_fit(self) -> Self:
        if len(set(self.experts)) != len(self.experts):
            raise ValueError("an expert stands twice")
        if unknown := set(self.policy.weights or ()) - set(self.experts):
            raise ValueError(f"the policy weighs {sorted(unknown)[0]!r}, which is no expert of the router")
        return self


def is_late(router: RouterRecord | None) -> bool:
    """Whether a router says what versions below the latest do not know."""
    if router is None:
        return False
    return router.asks or router.policy.combine != "parameters" or router.policy.outside == "uniform"


def drop_late_fields(router: dict[str, Any] | None) -> None:
    """Leave out of a router's data what versions below the latest do not know."""
    if router is not None:
        del router["policy"]["combine"]
        for name in ("reads", "first_token", "form"):
            del router[name]
