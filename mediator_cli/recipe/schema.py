"""What a recipe may say: form only. What it means for given checkpoints is checked by `plan`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from mediator_cli.recipe.align import AlignSpec
from mediator_cli.recipe.average import AverageSpec
from mediator_cli.recipe.extract import ExtractSpec, OverrideExtract
from mediator_cli.recipe.layers import Graded, Layers
from mediator_cli.recipe.moe import MoeSpec
from mediator_cli.recipe.names import ExpertName, check_expert_names
from mediator_cli.recipe.router import RouterSpec
from mediator_cli.recipe.sizes import parse_size
from mediator_cli.recipe.slices import WITH_SLICES, SliceSpec
from mediator_cli.recipe.strict import Finite, Fraction, Strict
from mediator_cli.recipe.tokens import TokenSpec

Unit = Literal["layer", "block", "tensor"]
Measure = Literal["sign", "any_sign", "cosine"]
Rule = Literal["none", "all", "threshold", "top_k", "mean_std", "byte_budget", "listed"]
OutputDtype = Literal["base", "float32", "float16", "bfloat16"]

_NOT_OF_MOE = ("slices", "outside", "align", "extract", "router")


class ExpertSpec(Strict):
    """One fine-tune of the base: a full checkpoint or a LoRA adapter."""

    name: ExpertName
    model: Annotated[
        str, Field(min_length=1, description="A checkpoint or a PEFT LoRA adapter: a folder, or org/name[@revision].")
    ]
    weight: Annotated[
        Graded,
        Field(description="Merge coefficient of this expert: a number, or a list of anchors over the layers."),
    ] = 1.0
    prompts: Annotated[
        str | None, Field(description="JSON lines with a `prompt` each; the router is fitted on them.")
    ] = None
    second_moments: Annotated[
        str | None,
        Field(
            min_length=1,
            description="Adam's second moments (exp_avg_sq) of this expert, under the base's tensor names: a file of "
            "safetensors, or a folder with one. For methods that weigh by them.",
        ),
    ] = None


class DenoiseSpec(Strict):
    """Which small entries of a delta are left out when conflict is counted; `none` or one of the two."""

    keep_above_std: Annotated[
        float | None,
        Field(gt=0, allow_inf_nan=False, description="Keep entries further from the mean than this many deviations."),
    ] = None
    top_fraction: Annotated[
        Fraction | None, Field(description="Keep this fraction of each tensor, the largest by magnitude.")
    ] = None

    @model_validator(mode="before")
    @classmethod
    def _none_is_empty(cls, data: Any) -> Any:  # noqa: ANN401 - pydantic hands over whatever the file holds
        return {} if data == "none" else data

    @model_validator(mode="after")
    def _one_at_most(self) -> DenoiseSpec:
        if self.keep_above_std is not None and self.top_fraction is not None:
            raise ValueError("give keep_above_std or top_fraction, not both")
        return self


class ConflictSpec(Strict):
    """How disagreement between experts is measured."""

    measure: Annotated[
        Measure,
        Field(
            description="Score that the assignment uses: `sign` = share of opposite signs, mean over pairs; "
            "`any_sign` = share of entries where any two disagree; `cosine` = (1 - cosine) / 2, mean over pairs."
        ),
    ] = "sign"
    denoise: DenoiseSpec = DenoiseSpec(keep_above_std=1.0)
    unit: Annotated[
        Unit, Field(description="What is averaged or routed as a whole: a decoder layer, a block of it, or a tensor.")
    ] = "layer"


def _is_size(value: int | str | None) -> int | str | None:
    if value is not None:
        parse_size(value)
    return value


RULE_FIELDS: dict[str, tuple[str, ...]] = {
    "none": (),
    "all": ("candidates",),
    "threshold": ("threshold", "candidates"),
    "top_k": ("k", "candidates"),
    "mean_std": ("std", "candidates"),
    "byte_budget": ("bytes", "candidates"),
    "listed": ("units",),
}
"""The fields of `assign` that each rule takes."""


class AssignSpec(Strict):
    """Which units are routed; the others are averaged."""

    rule: Annotated[
        Rule,
        Field(
            description="none: average all. all: route all candidates. threshold: score > threshold. "
            "top_k: the k highest scores. "
            "mean_std: score > mean + std deviations. "
            "byte_budget: from the highest score down, each unit whose sparse experts still fit. "
            "listed: the units named."
        ),
    ] = "mean_std"
    threshold: Annotated[
        float | None, Field(ge=0, le=1, allow_inf_nan=False, description="Score above which a unit is routed.")
    ] = None
    k: Annotated[int | None, Field(ge=0, description="Number of units that are routed.")] = None
    std: Annotated[Finite | None, Field(description="Deviations above the mean; default 0.")] = None
    bytes: Annotated[
        int | str | None,
        AfterValidator(_is_size),
        Field(description="Most that the sparse experts of all units may take together, such as 500MB."),
    ] = None
    units: Annotated[
        tuple[str, ...] | None, Field(strict=False, description="Unit names or globs, for rule `listed`.")
    ] = None
    candidates: Annotated[
        Literal["layers", "all"] | None,
        Field(
            description="layers: only decoder layers may be routed. all: embedding, final norm and head too. "
            "Default: all for rule `all`, else layers."
        ),
    ] = None

    @model_validator(mode="after")
    def _fields_fit_rule(self) -> AssignSpec:
        allowed = RULE_FIELDS[self.rule]
        given = self.model_fields_set - {"rule"}
        if extra := sorted(given - set(allowed)):
            raise ValueError(f"rule '{self.rule}' takes no {', '.join(extra)}")
        for name in ("threshold", "k", "bytes", "units"):
            if name in allowed and getattr(self, name) is None:
                raise ValueError(f"rule '{self.rule}' needs {name}")
        return self


class OverrideSpec(Strict):
    """Other settings for the tensors that both `match` and `layers` choose; later overrides win."""

    match: Annotated[
        str, Field(min_length=1, description="Glob on tensor names, such as `*.self_attn.*`; default all.")
    ] = "*"
    layers: Annotated[
        Layers | None, Field(description="Numbers of decoder layers: 3, 0-10 (both ends), or a list; default all.")
    ] = None
    average: Annotated[
        AverageSpec | None,
        Field(description="A method with its parameters, or parameters alone: the method that applies then stays."),
    ] = None
    extract: OverrideExtract | None = None
    weights: Annotated[
        dict[str, Graded] | None, Field(min_length=1, description="Merge coefficients of some experts, by name.")
    ] = None
    optional: Annotated[bool, Field(description="Whether it may match nothing.")] = False

    @model_validator(mode="after")
    def _sets_something(self) -> OverrideSpec:
        if not {"match", "layers"} & self.model_fields_set:
            raise ValueError("an override needs match or layers")
        if self.average is None and self.extract is None and self.weights is None:
            raise ValueError("an override needs average, extract or weights")
        if self.average is not None:
            self.average.check_change()
        return self


class OutputSpec(Strict):
    """Where and how the bundle is written."""

    path: Annotated[
        str | None, Field(description="Folder of the bundle; default: a folder named after the recipe.")
    ] = None
    dtype: Annotated[OutputDtype, Field(description="base: each tensor keeps the base's dtype.")] = "base"
    shard_size: Annotated[
        int | str, AfterValidator(_is_size), Field(description="Largest size of one safetensors file.")
    ] = "5GB"


class Recipe(Strict):
    """What the user asked: base, experts, and the decisions of each stage."""

    version: Annotated[Literal[1], Field(description="Version of the recipe format.")]
    kind: Annotated[
        Literal["mediator", "moe"],
        Field(
            description="mediator: a bundle; a static merge is rule none. moe: a Mixture of Experts that stock "
            "software loads, with experts in the layers that are routed."
        ),
    ] = "mediator"
    base: Annotated[
        str,
        Field(
            min_length=1,
            description="Model that all experts were tuned from: a folder, or org/name[@revision] on the Hub.",
        ),
    ]
    slices: Annotated[
        tuple[SliceSpec, ...],
        Field(strict=False, description="The layers of the output, slice by slice, from ranges of sources' layers."),
    ] = ()
    outside: Annotated[
        str,
        Field(
            description="With slices, where tensors outside the layers come from. slices: embeddings as in the first "
            "slice, all others as in the last. average: all experts merged. base or an expert's name: copied."
        ),
    ] = WITH_SLICES
    experts: Annotated[
        tuple[ExpertSpec, ...],
        Field(strict=False, description="The fine-tunes to merge, in order; may be none where slices are of the base."),
    ]
    keep_base: Annotated[
        tuple[str, ...] | None,
        Field(
            strict=False,
            description="Globs on names of tensors that are the base's as they are: never merged, and experts may lack "
            "them or have others. Default: none, but all outside the language part of a model that also sees or hears.",
        ),
    ] = None
    align: Annotated[
        AlignSpec | None, Field(description="How the experts' hidden units are put in one order first; default: not.")
    ] = None
    moe: Annotated[
        MoeSpec | None, Field(description="Of kind moe: the format, the gates, and what holds for single experts.")
    ] = None
    conflict: ConflictSpec = ConflictSpec()
    assign: AssignSpec = AssignSpec(rule="all", candidates="layers")
    average: AverageSpec = AverageSpec()
    extract: ExtractSpec = ExtractSpec()
    overrides: Annotated[
        tuple[OverrideSpec, ...], Field(strict=False, description="Other settings for some tensors; later ones win.")
    ] = ()
    anchors: Annotated[
        Literal["near", "first"],
        Field(
            description="Where tensors outside the layers stand in lists of anchors. near: embeddings at the first, "
            "all others at the last. first: all at the first."
        ),
    ] = "near"
    router: Annotated[
        RouterSpec | None,
        Field(description="How the router is made; without it, by defaults where all experts have prompts."),
    ] = None
    tokenizer: Annotated[
        str,
        Field(
            pattern=r"^(base|union|expert:.+)$",
            description="base or expert:NAME: whose tokens, tokenizer, chat template, generation config and token ids "
            "win. union: the base's, and behind its tokens those that experts add.",
        ),
    ] = "base"
    tokens: Annotated[
        dict[str, TokenSpec],
        Field(default_factory=dict, description="Rows of single tokens, by their text; new ones are added."),
    ]
    pad_tokens_to: Annotated[
        int | None, Field(ge=1, description="Rows of tokens are made a multiple of this number; those beyond are zero.")
    ] = None
    chat_template: Annotated[
        str | None,
        Field(
            min_length=1,
            description="auto: what most sources have. chatml, llama3, mistral, alpaca or exaone: these formats. Else "
            "the template's own text. Default: that of the tokenizer.",
        ),
    ] = None
    output: OutputSpec = OutputSpec()
    seed: Annotated[int, Field(ge=0, lt=2**63, description="Seed of everything random.")] = 0

    @field_validator("experts")
    @classmethod
    def _names_are_unique(cls, experts: tuple[ExpertSpec, ...], info: ValidationInfo) -> tuple[ExpertSpec, ...]:
        if not experts and not info.data.get("slices"):
            raise PydanticCustomError("too_short", "Tuple should have at least 1 item after validation, not 0")
        check_expert_names([expert.name for expert in experts])
        return experts

    @field_validator("tokenizer")
    @classmethod
    def _tokenizer_names_an_expert(cls, tokenizer: str, info: ValidationInfo) -> str:
        kind, _, name = tokenizer.partition(":")
        experts: tuple[ExpertSpec, ...] | None = info.data.get("experts")
        if kind == "expert" and experts is not None and name not in [expert.name for expert in experts]:
            raise ValueError(f"tokenizer names no expert: '{name}'")
        return tokenizer

    @model_validator(mode="after")
    def _outside_is_of_slices(self) -> Recipe:
        if not self.slices and "outside" in self.model_fields_set:
            raise ValueError("`outside` goes with `slices`")
        return self

    @model_validator(mode="after")
    def _fields_fit_kind(self) -> Recipe:
        if self.kind != "moe":
            if self.moe is not None:
                raise ValueError("`moe` goes with `kind: moe`")
            return self
        others = [name for name in _NOT_OF_MOE if name in self.model_fields_set]
        if others:
            raise ValueError(f"`{others[0]}` does not go with `kind: moe`")
        if self.assign.rule == "none":
            raise ValueError("rule none gives no layer experts; for a static merge write `kind: mediator`")
        if self.conflict.unit == "tensor":
            raise ValueError("experts are whole feed-forward blocks: write `conflict: {unit: layer}` or `block`")
        return self

    @property
    def moe_spec(self) -> MoeSpec:
        """What a recipe of kind moe says of its experts, with defaults where it says nothing."""
        return self.moe or MoeSpec()

    @property
    def tokenizer_of(self) -> str:
        """The source whose tokenizer, chat template and generation config win: `base` or an expert's name."""
        return "base" if self.tokenizer == "union" else self.tokenizer.removeprefix("expert:")
