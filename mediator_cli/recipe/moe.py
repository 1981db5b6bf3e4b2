"""What a recipe of kind `moe` says: the format that is written, its experts, and how their gates are made."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field

from mediator_cli.recipe.strict import Fraction, Strict

Format = Literal["auto", "mixtral", "qwen2_moe", "qwen3_moe", "granitemoeshared"]
GateMethod = Literal[
    "random", "uniform_random", "hidden", "hidden_avg", "hidden_last", "cheap_embed", "centred", "ridge", "logistic"
]
GATE_METHODS: tuple[GateMethod, ...] = get_args(GateMethod)
NO_PROMPTS: tuple[GateMethod, ...] = ("random", "uniform_random")
"""Gates that need no prompts."""
OF_BASE: tuple[GateMethod, ...] = ("hidden", "hidden_avg", "hidden_last", "cheap_embed")
"""Gates that are made from the base's states, as mergekit-moe does, and take negative prompts."""
AVERAGE = "average"
"""Where all that is no expert comes from: the experts, averaged."""

Prompts = tuple[Annotated[str, Field(min_length=1)], ...]


class GateSpec(Strict):
    """How gates are made, without training."""

    method: Annotated[
        GateMethod,
        Field(
            description="random, uniform_random: no prompts are needed. hidden, hidden_avg, hidden_last, cheap_embed: "
            "as mergekit-moe, from the base's states. centred: mean of the states that the gates read, centred over "
            "experts. ridge, logistic: classifiers of these states, which know the tasks best."
        ),
    ] = "ridge"
    temperature: Annotated[
        float | None,
        Field(gt=0, allow_inf_nan=False, description="Divides the gates' values; default: what suits the method."),
    ] = None
    strength: Annotated[
        float | None, Field(gt=0, allow_inf_nan=False, description="Of ridge and logistic: the penalty on their size.")
    ] = None
    chat: Annotated[
        bool | None,
        Field(
            description="Whether prompts are put in the chat template. Default: where the MoE reads them, as they "
            "will be asked; not where the base does."
        ),
    ] = None
    prompts: Annotated[
        int | None, Field(ge=1, description="How many prompts of each expert are read at most; default: see the docs.")
    ] = None


class MoeExpertSpec(Strict):
    """What holds for one expert of the MoE alone."""

    positive_prompts: Annotated[
        Prompts, Field(strict=False, description="Texts that this expert is for; default: those in its `prompts` file.")
    ] = ()
    negative_prompts: Annotated[
        Prompts, Field(strict=False, description="Texts that it is not for; for gates as mergekit-moe makes them.")
    ] = ()
    residual_scale: Annotated[
        float, Field(allow_inf_nan=False, description="Factor on what the expert writes: its down projection.")
    ] = 1.0
    noise_scale: Annotated[
        float, Field(ge=0, allow_inf_nan=False, description="Standard deviation of noise added to its matrices.")
    ] = 0.0


class MoeSpec(Strict):
    """A Mixture of Experts that stock software loads: everything but the feed-forward blocks is shared."""

    format: Annotated[
        Format,
        Field(
            description="auto: mixtral for Llama and Mistral, qwen2_moe and qwen3_moe for Qwen; qwen2_moe for Llama "
            "where only some layers get experts. granitemoeshared: the merged block for all, and for each expert the "
            "neurons in which it differs most."
        ),
    ] = "auto"
    experts_per_token: Annotated[int, Field(ge=1, description="How many experts answer each token.")] = 2
    base_expert: Annotated[bool, Field(description="Whether the base is one more expert, named `base`.")] = False
    shared_from: Annotated[
        str,
        Field(
            min_length=1,
            description="Where all that is no expert comes from. average: from all experts, by `average`. base or an "
            "expert's name: copied.",
        ),
    ] = AVERAGE
    neurons: Annotated[
        Fraction | None,
        Field(description="Of granitemoeshared: the share of hidden neurons that an expert keeps. Default 0.25."),
    ] = None
    gates: GateSpec = GateSpec()
    experts: Annotated[
        dict[str, MoeExpertSpec], Field(description="What holds for single experts, by name; `base` for the base.")
    ] = {}  # noqa: RUF012 - pydantic copies it
